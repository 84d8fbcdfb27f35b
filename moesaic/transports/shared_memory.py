"""The same-host lane: what router and worker agree on beside the messages, which are those of gRPC.

A call lives in a buffer, memory of the router's that both ends map: its message first, its rows behind it. The answer is
written over them. The socket carries frames of one small size, which say which buffer and how much of it, so a frame is
never split and, with a bounded number of buffers, no send ever blocks.
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

LANE_VERSION = 1
# Calls in flight on one lane, each in a buffer of its own.
MAX_BUFFERS = 16
# Rows and answers of the largest call that gRPC would carry.
MAX_BUFFER_BYTES = 512 << 20
# Where rows may begin: no product reads across a cache line that it need not.
ALIGN_BYTES = 64
# What a worker says first: its incarnation, and its clock.
GREETING_BYTES = 256

_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_CUT_OFF = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FD_BYTES = array("i").itemsize
_RIGHTS_BYTES = socket.CMSG_SPACE(_FD_BYTES)


class LaneError(Exception):
    """The other end does not keep to the framing: the lane is closed."""


class Frame(NamedTuple):
    """A call to the worker, or its answer: the message begins at 0 in the buffer, the data where they say."""

    buffer: int
    message_bytes: int
    data_offset: int
    data_bytes: int
    # CLOCK_MONOTONIC, the same on both ends; it counts the time that a frame waits in the socket.
    sent_ns: int


_FRAME = struct.Struct("<5Q")
_GREETING = struct.Struct("<Q")
FRAME_BYTES = _FRAME.size


def encode_frame(frame: Frame) -> bytes:
    return _FRAME.pack(*frame)


def decode_frame(raw: bytes) -> Frame:
    """Raises LaneError for another size; `Buffer.check` says whether its places are sound."""
    if len(raw) != FRAME_BYTES:
        raise LaneError("a frame of another size")
    return Frame._make(_FRAME.unpack(raw))


def encode_greeting(incarnation: str, now_ns: int) -> bytes:
    return _GREETING.pack(now_ns) + incarnation.encode()


def decode_greeting(raw: bytes) -> tuple[str, int]:
    """The worker's incarnation and clock. Raises LaneError."""
    if len(raw) < _GREETING.size:
        raise LaneError("a greeting of another size")
    return raw[_GREETING.size :].decode(errors="replace"), _GREETING.unpack_from(raw)[0]


class Buffer:
    """Memory that both ends map. It is unmapped when the last view of it is gone."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        # Populated at once: a page fault in the middle of a call costs more than its rows.
        self.bytes = memoryview(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))

    def check(self, frame: Frame) -> None:
        """Raises LaneError when the frame names places outside of this buffer."""
        _, message_bytes, data_offset, data_bytes, _ = frame
        if (
            message_bytes > data_offset
            or data_offset + data_bytes > self.num_bytes
            or data_offset % ALIGN_BYTES
        ):
            raise LaneError("a frame points outside its buffer")

    def message(self, frame: Frame) -> bytes:
        """A copy: what is checked must not change afterwards."""
        return bytes(self.bytes[: frame.message_bytes])

    def data(self, frame: Frame) -> memoryview:
        return self.bytes[frame.data_offset : frame.data_offset + frame.data_bytes]


def make_buffer(num_bytes: int) -> tuple[Buffer, int]:
    """A new buffer and the descriptor that gives it to the other end, to be closed by the caller."""
    fd = os.memfd_create("moesaic-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        # Never smaller again: whoever maps it could be killed by a truncation.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return Buffer(fd, num_bytes), fd
    except BaseException:
        os.close(fd)
        raise


def open_buffer(fd: int) -> Buffer:
    """The buffer behind a descriptor that came over a lane. Raises LaneError when it could shrink or is too large."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise LaneError("not a memory file") from error
    num_bytes = os.fstat(fd).st_size
    if not seals & fcntl.F_SEAL_SHRINK or not 0 < num_bytes <= MAX_BUFFER_BYTES:
        raise LaneError("a memory file that is not sealed, or of another size")
    try:
        return Buffer(fd, num_bytes)
    except OSError as error:
        raise LaneError("a memory file that cannot be mapped") from error


def send_frame(connection: socket.socket, frame: Frame, fd: int | None = None) -> None:
    """Sends without waiting. Raises OSError when the other end is gone, or lets frames pile up."""
    raw = encode_frame(frame)
    if fd is None:
        connection.send(raw, _SEND_FLAGS)
    else:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        connection.sendmsg([raw], rights, _SEND_FLAGS)


def receive_frame(connection: socket.socket) -> tuple[Frame, int | None] | None:
    """The next frame, and the descriptor that came with it: the caller closes it. None at the end.

    Raises BlockingIOError when there is none yet, OSError when the other end is gone, LaneError for anything else."""
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
    raise LaneError("not a frame")


def lane_socket() -> socket.socket:
    """A socket that keeps frames apart."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def align(num_bytes: int) -> int:
    """The next place where rows may begin."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as the user of this one."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.geteuid())


def host_id() -> str:
    """The running kernel, or nothing where there is no lane to be had."""
    if sys.platform != "linux":
        return ""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
