"""The router's end of shared memory, against a worker's end that the test plays by hand."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesaic.errors import DataLoss, Overloaded, Unavailable, to_status
from moesaic.transports import shared_memory
from moesaic.transports.shared_memory import Buffer, Frame, SharedMemoryError
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.tensors import data_of, encode_rows, view_rows
from router.workers.transports.shared_memory import SharedMemoryTransport, connect

WAIT_S = 60.0
HIDDEN = torch.arange(8.0).view(2, 4)


class Worker:
    """The other end: reads a call when it is told to, and doubles its rows."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffers: dict[int, Buffer] = {}

    def take(self) -> tuple[Frame, expert_pb2.ComputeRequest]:
        received = shared_memory.receive_frame(self.connection)
        assert received is not None
        frame, fd = received
        if fd is not None:
            self.buffers[frame.buffer] = shared_memory.open_buffer(fd)
            os.close(fd)
        buffer = self.buffers[frame.buffer]
        buffer.check(frame)
        return frame, expert_pb2.ComputeRequest.FromString(buffer.message(frame))

    def answer(self, frame: Frame, request: expert_pb2.ComputeRequest, **changes: object) -> None:
        buffer = self.buffers[frame.buffer]
        hidden = view_rows(request.hidden, buffer.data(frame))
        indices = [row for group in request.experts for row in group.rows]
        header, rows = encode_rows(hidden[indices] * 2, request.hidden.dtype)
        response = expert_pb2.ComputeResponse(
            **{"call_id": request.call_id, "epoch": request.epoch, "output": header} | changes
        )
        self.reply(frame, response.SerializeToString(), data_of(rows))

    def reply(self, frame: Frame, message: bytes, data: bytes | memoryview = b"") -> None:
        buffer = self.buffers[frame.buffer]
        buffer.bytes[: len(message)] = message
        buffer.bytes[frame.data_offset : frame.data_offset + len(data)] = data
        answer = frame._replace(message_bytes=len(message), data_bytes=len(data))
        shared_memory.send_frame(self.connection, answer)


@pytest.fixture
def ends() -> Iterator[tuple[SharedMemoryTransport, Worker]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = SharedMemoryTransport(ours)
    yield link, Worker(theirs)
    link.close()
    theirs.close()


@pytest.fixture
def link(ends: tuple[SharedMemoryTransport, Worker]) -> SharedMemoryTransport:
    return ends[0]


@pytest.fixture
def worker(ends: tuple[SharedMemoryTransport, Worker]) -> Worker:
    return ends[1]


def send(
    link: SharedMemoryTransport, call_id: int, hidden: torch.Tensor = HIDDEN, rows: tuple[int, ...] = (1,)
) -> None:
    header, wire = encode_rows(hidden, common_pb2.DTYPE_FLOAT32)
    request = expert_pb2.ComputeRequest(
        call_id=call_id,
        hidden=header,
        experts=[expert_pb2.ExpertRows(rows=rows)],
        combine=expert_pb2.COMBINE_ROWS,
        timeout_ms=1000,
    )
    link.send(request, wire)


def test_rows_go_there_and_back(link: SharedMemoryTransport, worker: Worker) -> None:
    send(link, 1)
    assert link.num_in_flight == 1
    worker.answer(*worker.take())
    answer = link.receive(1, WAIT_S)
    assert answer.response.call_id == 1 and answer.output.tolist() == [[8.0, 10.0, 12.0, 14.0]]
    assert link.num_in_flight == 0 and not link.broken


def test_answers_find_their_calls_in_whatever_order_they_come(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    for call_id in range(1, 4):
        send(link, call_id, HIDDEN + call_id)
    for taken in reversed([worker.take() for _ in range(3)]):
        worker.answer(*taken)
    for call_id in range(1, 4):
        assert torch.equal(link.receive(call_id, WAIT_S).output, (HIDDEN[1:] + call_id) * 2)


def test_a_buffer_is_used_again_and_grows_with_its_calls(link: SharedMemoryTransport, worker: Worker) -> None:
    opened = set()
    for call_id, num_rows in enumerate((1, 2, 1, 2, 100_000, 5, 1), start=1):
        hidden = torch.full((num_rows, 4), float(call_id))
        send(link, call_id, hidden, tuple(range(num_rows)))
        frame, request = worker.take()
        opened.add(id(worker.buffers[frame.buffer]))
        worker.answer(frame, request)
        assert torch.equal(link.receive(call_id, WAIT_S).output, hidden * 2)
    assert len(worker.buffers) <= 2 and len(opened) <= 3


def test_an_answer_with_more_rows_than_its_call_has_room(link: SharedMemoryTransport, worker: Worker) -> None:
    hidden = torch.randn(20, 1000)
    header, wire = encode_rows(hidden, common_pb2.DTYPE_FLOAT32)
    experts = [expert_pb2.ExpertRows(slot=slot, rows=range(20)) for slot in range(8)]
    request = expert_pb2.ComputeRequest(
        call_id=1, hidden=header, experts=experts, combine=expert_pb2.COMBINE_ROWS
    )
    link.send(request, wire)
    worker.answer(*worker.take())
    assert torch.equal(link.receive(1, WAIT_S).output, torch.cat([hidden * 2] * 8))


def test_the_answer_to_a_single_row_has_room_for_all_its_experts(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    hidden = torch.randn(1, 10_000)
    header, wire = encode_rows(hidden, common_pb2.DTYPE_FLOAT32)
    experts = [expert_pb2.ExpertRows(slot=slot, rows=[0]) for slot in range(8)]
    request = expert_pb2.ComputeRequest(
        call_id=1, hidden=header, experts=experts, combine=expert_pb2.COMBINE_ROWS
    )
    link.send(request, wire)
    worker.answer(*worker.take())
    assert torch.equal(link.receive(1, WAIT_S).output, torch.cat([hidden * 2] * 8))


def test_a_refusal_is_raised_with_its_details_and_the_connection_goes_on(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    send(link, 1)
    frame, _ = worker.take()
    refused = expert_pb2.ComputeResponse(call_id=1, error=to_status(Overloaded("full", retry_after_s=0.5)))
    worker.reply(frame, refused.SerializeToString())
    with pytest.raises(Overloaded) as caught:
        link.receive(1, WAIT_S)
    assert caught.value.retry_after_s == 0.5
    send(link, 2)
    worker.answer(*worker.take())
    assert link.receive(2, WAIT_S)


def test_a_late_answer_is_dropped_and_its_buffer_rests_until_it_came(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    send(link, 1)
    late = worker.take()
    with pytest.raises(TimeoutError):
        link.receive(1, 0.01)
    assert link.num_in_flight == 0
    send(link, 2, HIDDEN + 1)
    taken = worker.take()
    assert taken[0].buffer != late[0].buffer
    worker.answer(*late)
    worker.answer(*taken)
    assert torch.equal(link.receive(2, WAIT_S).output, (HIDDEN[1:] + 1) * 2)


def test_an_answer_that_is_there_is_taken_even_when_no_time_is_left(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    send(link, 1)
    worker.answer(*worker.take())
    assert link.receive(1, 0.0).response.call_id == 1


def test_calls_beyond_the_buffers_are_refused_until_late_answers_give_some_back(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    for call_id in range(1, shared_memory.MAX_BUFFERS + 1):
        send(link, call_id)
    taken = [worker.take() for _ in range(shared_memory.MAX_BUFFERS)]
    send(link, 100)
    with pytest.raises(Overloaded):
        link.receive(100, WAIT_S)
    for call_id in range(1, 5):
        with pytest.raises(TimeoutError):
            link.receive(call_id, 0.0)
    for late in taken[:4]:
        worker.answer(*late)
    send(link, 101)
    worker.answer(*worker.take())
    assert link.receive(101, WAIT_S).response.call_id == 101


def test_a_broken_connection_fails_what_is_in_flight_at_once_and_what_comes_after(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    for call_id in range(1, 4):
        send(link, call_id)
    worker.answer(*worker.take())
    worker.connection.close()
    with pytest.raises(Unavailable):
        link.receive(2, WAIT_S)
    assert link.broken
    assert link.receive(1, WAIT_S).response.call_id == 1, "it was answered before"
    send(link, 4)
    for lost in (3, 4):
        with pytest.raises(Unavailable):
            link.receive(lost, WAIT_S)


def test_a_worker_that_is_gone_before_the_call_is_noticed(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    worker.connection.close()
    send(link, 1)
    with pytest.raises(Unavailable):
        link.receive(1, WAIT_S)
    assert link.broken


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no frame",
        shared_memory.encode_frame(Frame(99, 0, 0, 0, 0)),
        shared_memory.encode_frame(Frame(1, 0, 0, 0, 0)),
        shared_memory.encode_frame(Frame(0, 1 << 60, 1 << 61, 0, 0)),
        shared_memory.encode_frame(Frame(0, 0, 0, 1 << 40, 0)),
    ],
)
def test_a_worker_that_sends_nonsense_breaks_its_connection(
    link: SharedMemoryTransport, worker: Worker, raw: bytes
) -> None:
    send(link, 1)
    frame, _ = worker.take()
    worker.connection.send(raw.replace(bytes(8), frame.buffer.to_bytes(8, "little"), 1) if raw else raw)
    with pytest.raises(Unavailable):
        link.receive(1, 0.5)
    assert link.broken


def test_an_answer_that_is_no_message_of_this_call_is_lost_data(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    for call_id, message in enumerate(
        (
            b"\xff\xff\xff",
            expert_pb2.ComputeResponse(call_id=99).SerializeToString(),
            expert_pb2.ComputeResponse(
                call_id=3, output=common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[1000, 4])
            ).SerializeToString(),
            expert_pb2.ComputeResponse(
                call_id=4,
                output=common_pb2.Tensor(dtype=99, shape=[1]),  # type: ignore[arg-type]
            ).SerializeToString(),
        ),
        start=1,
    ):
        send(link, call_id)
        frame, _ = worker.take()
        worker.reply(frame, message, b"1234")
        with pytest.raises(DataLoss):
            link.receive(call_id, WAIT_S)
    send(link, 5)
    worker.answer(*worker.take())
    assert link.receive(5, WAIT_S)


def test_close_wakes_whoever_waits(link: SharedMemoryTransport) -> None:
    send(link, 1)
    failed = threading.Event()

    def wait() -> None:
        try:
            link.receive(1, WAIT_S)
        except Unavailable:
            failed.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    link.close()
    assert failed.wait(WAIT_S)
    waiting.join(WAIT_S)
    link.close()
    send(link, 2)
    with pytest.raises(Unavailable):
        link.receive(2, WAIT_S)


@pytest.mark.parametrize(
    ("incarnation", "clock_s", "fits"), [("a-1", 0.0, True), ("a-2", 0.0, False), ("a-1", -100.0, False)]
)
def test_shared_memory_is_opened_only_to_just_that_worker_with_the_same_clock(
    tmp_path: Path, incarnation: str, clock_s: float, fits: bool
) -> None:
    path = str(tmp_path / "s")
    with shared_memory.frame_socket() as listening:
        listening.bind(path)
        listening.listen()

        def send_handshake() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.send(
                    shared_memory.encode_handshake("a-1", time.monotonic_ns() + int(clock_s * 1e9))
                )
                connection.recv(1)

        handshake = threading.Thread(target=send_handshake)
        handshake.start()
        try:
            connect(path, incarnation).close()
            entered = True
        except SharedMemoryError:
            entered = False
        handshake.join(WAIT_S)
    assert entered == fits


def test_a_socket_of_another_user_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s")
    with shared_memory.frame_socket() as listening:
        listening.bind(path)
        listening.listen()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(SharedMemoryError):
            connect(path, "a-1")


def test_waiting_leaves_a_call_as_it_is_and_abandoning_drops_its_late_answer(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    send(link, 1)
    assert not link.wait(1, 0.0) and link.num_in_flight == 1
    late = worker.take()
    link.abandon(1)
    assert link.num_in_flight == 0
    send(link, 2)
    worker.answer(*late)
    worker.answer(*worker.take())
    assert link.wait(2, WAIT_S)
    assert link.receive(2, 0.0).response.call_id == 2


def test_an_answer_that_nobody_fetches_gives_its_buffer_back(
    link: SharedMemoryTransport, worker: Worker
) -> None:
    for call_id in range(1, 4 * shared_memory.MAX_BUFFERS):
        send(link, call_id)
        worker.answer(*worker.take())
        assert link.wait(call_id, WAIT_S)
        link.abandon(call_id)


def test_waiting_ends_when_the_connection_breaks(link: SharedMemoryTransport, worker: Worker) -> None:
    send(link, 1)
    worker.connection.close()
    assert link.wait(1, WAIT_S)
    with pytest.raises(Unavailable):
        link.receive(1, 0.0)
