"""The sockets of the direct stream; its protocol is in grpc_connection.py."""

from __future__ import annotations

import errno
import socket
import struct

# The largest call, and the largest answer, that the direct stream carries. Larger ones take so long that the
# hand-over between grpcio's threads does not matter.
MAX_MESSAGE_BYTES = 4 << 20

# The kernel notices within this time that the other host vanished, whether or not bytes are under way to it: as long as
# grpcio waits for the answer to a ping. A worker that only computes or stands still is none: its kernel acknowledges.
# Where more bytes wait for such a worker than its socket holds, the kernel gives the connection up all the same.
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

# A connection is given up for its full sockets about 2 s after the last acknowledgement, and for silence after 5.
_ACKNOWLEDGED_LATELY_MS = 1000 * (GONE_AFTER_S - 1)
# Of the kernel's `struct tcp_info`: eight bytes and twelve words before the milliseconds since the last acknowledgement.
_SINCE_LAST_ACK = struct.Struct("=56xI")


def is_silence(error: OSError, connection: socket.socket) -> bool:
    """Whether a connection broke because its host is silent, so that no other connection to it would do better.
    `connection` is not closed yet."""
    return error.errno in _SILENCE and not _acknowledged_lately(connection)


def _acknowledged_lately(connection: socket.socket) -> bool:
    """False where the system does not say."""
    if not hasattr(socket, "TCP_INFO") or connection.family == socket.AF_UNIX:
        return False
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SINCE_LAST_ACK.size)
    since_ms: int = _SINCE_LAST_ACK.unpack(info)[0]
    return since_ms < _ACKNOWLEDGED_LATELY_MS


def prepare_socket(connection: socket.socket) -> None:
    """Makes a socket non-blocking, send at once, and detect a host that vanished. Raises OSError when the
    connection is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
