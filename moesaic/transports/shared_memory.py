"""The shared-memory transport: what router and worker agree on apart from the messages of gRPC.

A call lies in a buffer, memory of the router's that both ends map: the message first, then the rows. The
answer is written over them. A Unix socket carries frames of one small size, which name the buffer and the
parts of it in use. So a frame is never split and, because the number of buffers is bounded, no send ever
blocks.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import sys
from array import array
from pathlib import Path
from typing import NamedTuple

VERSION = 1
# Calls in flight on one connection, each in a buffer of its own.
MAX_BUFFERS = 16
# Enough for the call and the answer of the largest call that gRPC carries.
MAX_BUFFER_BYTES = 512 << 20
# The alignment of the rows, one cache line, so that a matrix product touches no more lines than it must.
ALIGN_BYTES = 64
# The most that a worker's first message, its clock and its incarnation, may take.
HANDSHAKE_BYTES = 256

_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_CUT_OFF = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FD_BYTES = array("i").itemsize
_RIGHTS_BYTES = socket.CMSG_SPACE(_FD_BYTES)


class SharedMemoryError(Exception):
    """The other end violates the framing; the connection is then closed."""


class Frame(NamedTuple):
    """A call to the worker, or its answer. The message begins at byte 0 of the buffer, the rows at
    `data_offset`."""

    buffer: int
    message_bytes: int
    data_offset: int
    data_bytes: int
    # CLOCK_MONOTONIC, the same at both ends, so that the time a frame waits in the socket is counted.
    sent_ns: int


_FRAME = struct.Struct("<5Q")
_HANDSHAKE = struct.Struct("<Q")
FRAME_BYTES = _FRAME.size


def encode_frame(frame: Frame) -> bytes:
    return _FRAME.pack(*frame)


def decode_frame(raw: bytes) -> Frame:
    """Raises SharedMemoryError for another size; `Buffer.check` validates the offsets."""
    if len(raw) != FRAME_BYTES:
        raise SharedMemoryError("a frame of another size")
    return Frame._make(_FRAME.unpack(raw))


def encode_handshake(incarnation: str, now_ns: int) -> bytes:
    return _HANDSHAKE.pack(now_ns) + incarnation.encode()


def decode_handshake(raw: bytes) -> tuple[str, int]:
    """The worker's incarnation and clock. Raises SharedMemoryError."""
    if len(raw) < _HANDSHAKE.size:
        raise SharedMemoryError("a handshake of another size")
    return raw[_HANDSHAKE.size :].decode(errors="replace"), _HANDSHAKE.unpack_from(raw)[0]


class Buffer:
    """Memory that both ends map. It is unmapped when its last view is released."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        # The pages are populated at once: a page fault during a call costs more than copying its rows.
        self.bytes = memoryview(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))

    def check(self, frame: Frame) -> None:
        """Raises SharedMemoryError when the frame points outside this buffer."""
        _, message_bytes, data_offset, data_bytes, _ = frame
        if (
            message_bytes > data_offset
            or data_offset + data_bytes > self.num_bytes
            or data_offset % ALIGN_BYTES
        ):
            raise SharedMemoryError("a frame points outside its buffer")

    def message(self, frame: Frame) -> bytes:
        """A copy, because a message must not change after it was checked."""
        return bytes(self.bytes[: frame.message_bytes])

    def data(self, frame: Frame) -> memoryview:
        return self.bytes[frame.data_offset : frame.data_offset + frame.data_bytes]


def make_buffer(num_bytes: int) -> tuple[Buffer, int]:
    """A new buffer, and the descriptor with which the other end maps it; the caller closes that."""
    fd = os.memfd_create("moesaic-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        # Sealed against shrinking: truncation would kill any process that maps it and touches the lost pages.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return Buffer(fd, num_bytes), fd
    except BaseException:
        os.close(fd)
        raise


def open_buffer(fd: int) -> Buffer:
    """Maps a received descriptor. Raises SharedMemoryError when it could shrink or is too large."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise SharedMemoryError("not a memory file") from error
    num_bytes = os.fstat(fd).st_size
    if not seals & fcntl.F_SEAL_SHRINK or not 0 < num_bytes <= MAX_BUFFER_BYTES:
        raise SharedMemoryError("a memory file that is not sealed, or of another size")
    try:
        return Buffer(fd, num_bytes)
    except OSError as error:
        raise SharedMemoryError("a memory file that cannot be mapped") from error


def send_frame(connection: socket.socket, frame: Frame, fd: int | None = None) -> None:
    """Sends without waiting. Raises OSError when the other end is gone or does not read its frames."""
    raw = encode_frame(frame)
    if fd is None:
        connection.send(raw, _SEND_FLAGS)
    else:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        connection.sendmsg([raw], rights, _SEND_FLAGS)


def receive_frame(connection: socket.socket) -> tuple[Frame, int | None] | None:
    """The next frame and the descriptor that came with it, which the caller closes. None at the end of the
    connection.

    Raises BlockingIOError when no frame has arrived, OSError when the other end is gone, and
    SharedMemoryError for anything that is not a frame."""
    raw, rights, flags, _ = connection.recvmsg(FRAME_BYTES, _RIGHTS_BYTES, _RECEIVE_FLAGS)
    if not rights and not flags & _CUT_OFF:
        return (decode_frame(raw), None) if raw else None
    fds = array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    if len(fds) == 1 and len(raw) == FRAME_BYTES and not flags & _CUT_OFF:
        return decode_frame(raw), fds[0]
    for fd in fds:
        os.close(fd)
    raise SharedMemoryError("not a frame")


def frame_socket() -> socket.socket:
    """A socket that preserves the boundaries of frames."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def align(num_bytes: int) -> int:
    """The next offset at which rows may begin."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as the user of this one."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.geteuid())


def host_id() -> str:
    """The id of the running kernel; empty where shared memory is not available."""
    if sys.platform != "linux":
        return ""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
