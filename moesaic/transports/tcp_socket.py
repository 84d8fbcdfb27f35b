"""The sockets of the direct stream; its protocol is in grpc_connection.py."""

from __future__ import annotations

import errno
import socket

# The largest call, and the largest answer, that the direct stream carries. Larger ones take so long that the
# hand-over between grpcio's threads does not matter.
MAX_MESSAGE_BYTES = 4 << 20

# The kernel notices within this time that the other host vanished, whether or not bytes are under way to it: as long as
# grpcio waits for the answer to a ping. A worker that only computes or stands still is none: its kernel acknowledges.
GONE_AFTER_S = 5
_QUIET_S = 2
_PROBE_PERIOD_S = 1
_PROBES = (GONE_AFTER_S - _QUIET_S) // _PROBE_PERIOD_S
# Not every system has all of them; grpcio's sockets do without them there as well.
_OPTIONS = (
    ("TCP_KEEPIDLE", _QUIET_S),
    ("TCP_KEEPINTVL", _PROBE_PERIOD_S),
    ("TCP_KEEPCNT", _PROBES),
    ("TCP_USER_TIMEOUT", GONE_AFTER_S * 1000),
)

# What the kernel says of a connection to a host that does not answer at all.
_SILENCE = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})


def is_silence(error: OSError) -> bool:
    """Whether a connection broke because its host is silent, so that no other connection to it would do better."""
    return error.errno in _SILENCE


def prepare_socket(connection: socket.socket) -> None:
    """Makes a socket non-blocking, send at once, and detect a host that vanished. Raises OSError when the
    connection is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
