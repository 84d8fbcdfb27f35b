"""Frames keep their form, and memory that could be taken away from under its user is not taken."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.transports import shared_memory
from moesaic.transports.shared_memory import Frame, SharedMemoryError

NUMBERS = st.integers(0, 2**64 - 1)
FRAME = Frame(3, 100, 128, 64, 7)
Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@given(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS))
def test_any_frame_comes_back_as_it_was(numbers: tuple[int, int, int, int, int]) -> None:
    frame = Frame(*numbers)
    assert shared_memory.decode_frame(shared_memory.encode_frame(frame)) == frame


@given(
    st.binary(max_size=2 * shared_memory.FRAME_BYTES).filter(
        lambda raw: len(raw) != shared_memory.FRAME_BYTES
    )
)
def test_bytes_of_another_size_are_no_frame(raw: bytes) -> None:
    with pytest.raises(SharedMemoryError):
        shared_memory.decode_frame(raw)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_a_frame_that_passes_its_check_lies_inside_its_buffer(
    message_bytes: int, data_offset: int, data_bytes: int
) -> None:
    buffer, fd = shared_memory.make_buffer(4096)
    os.close(fd)
    frame = Frame(0, message_bytes, data_offset, data_bytes, 0)
    try:
        buffer.check(frame)
    except SharedMemoryError:
        return
    assert len(buffer.message(frame)) == message_bytes <= data_offset
    assert buffer.data(frame).nbytes == data_bytes


@pytest.mark.parametrize(
    "frame",
    [
        FRAME._replace(message_bytes=129),
        FRAME._replace(data_offset=127),
        FRAME._replace(data_bytes=4096 - 128 + 1),
        FRAME._replace(data_offset=4096 + 64, data_bytes=0),
    ],
)
def test_a_frame_that_points_outside_its_buffer_is_refused(frame: Frame) -> None:
    buffer, fd = shared_memory.make_buffer(4096)
    os.close(fd)
    buffer.check(FRAME)
    with pytest.raises(SharedMemoryError):
        buffer.check(frame)


def test_a_buffer_is_the_same_memory_at_both_ends(ends: Ends) -> None:
    buffer, fd = shared_memory.make_buffer(4096)
    shared_memory.send_frame(ends[0], FRAME, fd)
    os.close(fd)
    received = shared_memory.receive_frame(ends[1])
    assert received is not None and received[0] == FRAME and received[1] is not None
    opened = shared_memory.open_buffer(received[1])
    os.close(received[1])
    buffer.data(FRAME)[:4] = b"rows"
    assert bytes(opened.data(FRAME)[:4]) == b"rows"
    opened.data(FRAME)[:4] = b"sums"
    assert bytes(buffer.data(FRAME)[:4]) == b"sums"


def test_a_buffer_can_never_shrink() -> None:
    _, fd = shared_memory.make_buffer(4096)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def test_memory_that_could_shrink_or_is_no_memory_is_not_opened() -> None:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    empty = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
    huge = os.memfd_create("huge", os.MFD_ALLOW_SEALING)
    os.ftruncate(huge, shared_memory.MAX_BUFFER_BYTES + 1)
    for fd in (empty, huge):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    read_end, write_end = os.pipe()
    for fd in (unsealed, empty, huge, read_end):
        with pytest.raises(SharedMemoryError):
            shared_memory.open_buffer(fd)
    for fd in (unsealed, empty, huge, read_end, write_end):
        os.close(fd)


def test_memory_that_may_not_be_written_is_not_opened() -> None:
    fd = os.memfd_create("read-only", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    with pytest.raises(SharedMemoryError):
        shared_memory.open_buffer(fd)
    os.close(fd)


@pytest.mark.parametrize(
    "raw", [b"x", bytes(shared_memory.FRAME_BYTES - 1), bytes(shared_memory.FRAME_BYTES + 1), bytes(5000)]
)
@pytest.mark.parametrize("num_fds", [0, 1, 2, 5])
def test_what_is_no_frame_is_an_error_and_leaks_no_descriptor(ends: Ends, raw: bytes, num_fds: int) -> None:
    fds = [os.memfd_create("any") for _ in range(num_fds)]
    before = num_open_files()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    ends[0].sendmsg([raw], rights)
    with pytest.raises(SharedMemoryError):
        shared_memory.receive_frame(ends[1])
    assert num_open_files() == before
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("num_fds", [2, 5])
def test_a_frame_brings_one_descriptor_at_most(ends: Ends, num_fds: int) -> None:
    fds = [os.memfd_create("any") for _ in range(num_fds)]
    before = num_open_files()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
    ends[0].sendmsg([shared_memory.encode_frame(FRAME)], rights)
    with pytest.raises(SharedMemoryError):
        shared_memory.receive_frame(ends[1])
    assert num_open_files() == before
    for fd in fds:
        os.close(fd)


def test_an_empty_socket_and_a_closed_one_are_told_apart(ends: Ends) -> None:
    with pytest.raises(BlockingIOError):
        shared_memory.receive_frame(ends[1])
    ends[0].close()
    assert shared_memory.receive_frame(ends[1]) is None


def test_a_frame_never_waits_for_its_reader(ends: Ends) -> None:
    with pytest.raises(BlockingIOError):
        for _ in range(1_000_000):
            shared_memory.send_frame(ends[0], FRAME)


def test_frames_of_all_buffers_fit_into_the_socket_at_once(ends: Ends) -> None:
    for index in range(shared_memory.MAX_BUFFERS):
        shared_memory.send_frame(ends[0], FRAME._replace(buffer=index))


def test_a_handshake_names_the_incarnation_and_the_time() -> None:
    assert shared_memory.decode_handshake(shared_memory.encode_handshake("abc", 12)) == ("abc", 12)
    for raw in (b"", b"1234567"):
        with pytest.raises(SharedMemoryError):
            shared_memory.decode_handshake(raw)
    assert shared_memory.decode_handshake(b"\xff" * 12)[0] != "abc"


def test_a_process_of_the_same_user_is_ours(ends: Ends) -> None:
    assert shared_memory.is_ours(ends[0])


def test_a_process_of_another_user_is_not_ours(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not shared_memory.is_ours(ends[0])


def test_a_host_has_one_name_as_long_as_it_runs() -> None:
    assert shared_memory.host_id() == shared_memory.host_id() != ""


def test_where_no_memory_is_left_there_is_no_buffer_and_no_descriptor() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = num_open_files()
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, hard))
    try:
        with pytest.raises((OSError, MemoryError)):
            shared_memory.make_buffer(256 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert num_open_files() == before
