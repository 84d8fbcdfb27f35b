"""The direct stream: what router and worker agree on beside the protocol, which is gRPC's (grpc_connection.py)."""

from __future__ import annotations

import socket

# The largest call, and the largest answer, that goes this way: what is larger takes long enough for threads not to matter.
MAX_MESSAGE_BYTES = 4 << 20

# A host that vanished is noticed by the kernel within so long, whether or not something is on its way to it.
GONE_AFTER_S = 20
_QUIET_S = 8
_PROBE_PERIOD_S = 4
_PROBES = (GONE_AFTER_S - _QUIET_S) // _PROBE_PERIOD_S
# Not every system knows all of them; gRPC's own sockets do without them there as well.
_OPTIONS = (
    ("TCP_KEEPIDLE", _QUIET_S),
    ("TCP_KEEPINTVL", _PROBE_PERIOD_S),
    ("TCP_KEEPCNT", _PROBES),
    ("TCP_USER_TIMEOUT", GONE_AFTER_S * 1000),
)


def prepare_socket(connection: socket.socket) -> None:
    """Sends at once, never waits, and learns of an end that vanished. Raises OSError when the connection is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
