"""The router's end of a direct stream, against a worker's end that the test plays by hand."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections import deque
from collections.abc import Iterator

import pytest
import torch

from moesaic.errors import DataLoss, FailedPrecondition, MoesaicError, Overloaded, Unavailable, to_status
from moesaic.transports.grpc_connection import Event, GrpcConnection, MessageReceived, StreamOpened
from moesaic.transports.tcp_socket import MAX_MESSAGE_BYTES, prepare_socket
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.messages import COMPUTE_METHOD, Framed, decode_request, encode_response
from moesaic.wire.tensors import data_of, encode_rows, view_rows
from router.workers.transports.base import HOST_SILENT
from router.workers.transports.direct_stream import MAX_CALLS, MAX_ROWS_BYTES, DirectStream, carries

WAIT_S = 60.0
HIDDEN = torch.arange(8.0).view(2, 4)


class Worker:
    """The other end: reads a call when it is told to, and doubles its rows."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.settimeout(WAIT_S)
        self.peer = GrpcConnection(client=False, max_message_bytes=MAX_MESSAGE_BYTES)
        self.stream_id = 0
        self._events: deque[Event] = deque()

    def take(self) -> Framed[expert_pb2.ComputeRequest]:
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, StreamOpened):
                    assert event.method == COMPUTE_METHOD
                    self.stream_id = event.stream_id
                    self.peer.accept_stream(event.stream_id)
                elif isinstance(event, MessageReceived):
                    return decode_request(event.data)
            raw = self.connection.recv(1 << 16)
            assert raw
            self._events += self.peer.receive(raw)
            self.flush()

    def answer(self, call: Framed[expert_pb2.ComputeRequest]) -> None:
        request = call.message
        hidden = view_rows(request.hidden, call.data)
        indices = [row for group in request.experts for row in group.rows]
        header, rows = encode_rows(hidden[indices] * 2, request.hidden.dtype)
        self.reply(expert_pb2.ComputeResponse(call_id=request.call_id, output=header), data_of(rows))

    def reply(self, response: expert_pb2.ComputeResponse, data: bytes | memoryview = b"") -> None:
        self.say(encode_response(Framed(response, memoryview(data))))

    def say(self, message: bytes) -> None:
        self.peer.send(self.stream_id, message)
        self.flush()

    def end(self, code: int, details: str = "") -> None:
        self.peer.end_stream(self.stream_id, code, details)
        self.flush()

    def flush(self) -> None:
        if outgoing := self.peer.take_outgoing():
            self.connection.sendall(outgoing)


@pytest.fixture
def ends() -> Iterator[tuple[DirectStream, Worker]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    prepare_socket(ours)
    stream = DirectStream(ours, "worker:1")
    yield stream, Worker(theirs)
    stream.close()
    theirs.close()


@pytest.fixture
def stream(ends: tuple[DirectStream, Worker]) -> DirectStream:
    return ends[0]


@pytest.fixture
def worker(ends: tuple[DirectStream, Worker]) -> Worker:
    return ends[1]


def make_request(
    call_id: int, hidden: torch.Tensor = HIDDEN, rows: tuple[int, ...] = (1,)
) -> tuple[expert_pb2.ComputeRequest, torch.Tensor]:
    header, wire = encode_rows(hidden, common_pb2.DTYPE_FLOAT32)
    experts = [expert_pb2.ExpertRows(rows=rows)]
    request = expert_pb2.ComputeRequest(
        call_id=call_id, hidden=header, experts=experts, combine=expert_pb2.COMBINE_ROWS
    )
    return request, wire


def send(
    stream: DirectStream, call_id: int, hidden: torch.Tensor = HIDDEN, rows: tuple[int, ...] = (1,)
) -> None:
    stream.send(*make_request(call_id, hidden, rows))


def test_rows_go_there_and_back(stream: DirectStream, worker: Worker) -> None:
    send(stream, 1)
    assert stream.num_in_flight == 1
    worker.answer(worker.take())
    answer = stream.receive(1, WAIT_S)
    assert answer.response.call_id == 1 and answer.output.tolist() == [[8.0, 10.0, 12.0, 14.0]]
    assert stream.num_in_flight == 0 and not stream.broken


def test_answers_find_their_calls_in_whatever_order_they_come(stream: DirectStream, worker: Worker) -> None:
    for call_id in range(1, 4):
        send(stream, call_id, HIDDEN + call_id)
    for taken in reversed([worker.take() for _ in range(3)]):
        worker.answer(taken)
    for call_id in range(1, 4):
        assert torch.equal(stream.receive(call_id, WAIT_S).output, (HIDDEN[1:] + call_id) * 2)


def test_a_send_takes_no_time_however_little_the_socket_takes(stream: DirectStream, worker: Worker) -> None:
    hidden = torch.randn(1024, 900)
    every_row = tuple(range(len(hidden)))
    for call_id in range(1, 9):
        send(stream, call_id, hidden + call_id, every_row)

    def compute() -> None:
        for _ in range(8):
            worker.answer(worker.take())

    computing = threading.Thread(target=compute)
    computing.start()
    for call_id in range(1, 9):
        assert torch.equal(stream.receive(call_id, WAIT_S).output, (hidden + call_id) * 2)
    computing.join(WAIT_S)


def test_a_refusal_is_raised_with_its_details_and_the_stream_goes_on(
    stream: DirectStream, worker: Worker
) -> None:
    send(stream, 1)
    worker.take()
    worker.reply(
        expert_pb2.ComputeResponse(call_id=1, error=to_status(Overloaded("full", retry_after_s=0.5)))
    )
    with pytest.raises(Overloaded) as caught:
        stream.receive(1, WAIT_S)
    assert caught.value.retry_after_s == 0.5
    send(stream, 2)
    worker.answer(worker.take())
    assert stream.receive(2, WAIT_S)


def test_a_late_answer_is_dropped(stream: DirectStream, worker: Worker) -> None:
    send(stream, 1)
    late = worker.take()
    with pytest.raises(TimeoutError):
        stream.receive(1, 0.01)
    assert stream.num_in_flight == 0
    send(stream, 2, HIDDEN + 1)
    taken = worker.take()
    worker.answer(late)
    worker.answer(taken)
    assert torch.equal(stream.receive(2, WAIT_S).output, (HIDDEN[1:] + 1) * 2)


def test_an_answer_that_is_there_is_taken_even_when_no_time_is_left(
    stream: DirectStream, worker: Worker
) -> None:
    for call_id in (1, 2):
        send(stream, call_id)
    for _ in range(2):
        worker.answer(worker.take())
    assert stream.receive(2, WAIT_S).response.call_id == 2
    assert stream.receive(1, 0.0).response.call_id == 1


def test_words_without_end_keep_no_call_beyond_its_time(stream: DirectStream, worker: Worker) -> None:
    send(stream, 1)
    worker.take()
    unknown_frames = b"\0\0\0\x63\0\0\0\0\0" * 10_000

    def flood() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                worker.connection.sendall(unknown_frames)

    flooding = threading.Thread(target=flood)
    flooding.start()
    with pytest.raises(TimeoutError):
        stream.receive(1, 0.01)
    stream.close()
    flooding.join(WAIT_S)
    assert not flooding.is_alive()


def test_calls_beyond_the_bound_are_refused_until_late_answers_make_room(
    stream: DirectStream, worker: Worker
) -> None:
    for call_id in range(1, MAX_CALLS + 1):
        send(stream, call_id)
    taken = [worker.take() for _ in range(MAX_CALLS)]
    for call_id in range(1, 5):
        with pytest.raises(TimeoutError):
            stream.receive(call_id, 0.0)
    send(stream, 100)
    with pytest.raises(Overloaded):
        stream.receive(100, WAIT_S)
    for call in taken[:5]:
        worker.answer(call)
    assert stream.receive(5, WAIT_S)
    send(stream, 101)
    worker.answer(worker.take())
    assert stream.receive(101, WAIT_S).response.call_id == 101


def test_a_call_that_no_message_can_carry_is_refused(stream: DirectStream) -> None:
    send(stream, 1, torch.zeros(2, MAX_MESSAGE_BYTES // 8))
    with pytest.raises(Overloaded):
        stream.receive(1, WAIT_S)
    assert not stream.broken


def test_a_worker_that_is_gone_fails_what_is_in_flight_at_once_and_what_comes_after(
    stream: DirectStream, worker: Worker
) -> None:
    for call_id in range(1, 4):
        send(stream, call_id)
    calls = [worker.take() for _ in range(3)]
    worker.answer(calls[0])
    worker.connection.close()
    with pytest.raises(Unavailable):
        stream.receive(2, WAIT_S)
    assert stream.broken
    assert stream.receive(1, WAIT_S).response.call_id == 1, "it was answered before"
    send(stream, 4)
    for lost in (3, 4):
        with pytest.raises(Unavailable):
            stream.receive(lost, WAIT_S)


class SilentHost(socket.socket):
    """The kernel has given up on its host."""

    def recv_into(self, *arguments: object) -> int:
        raise TimeoutError(errno.ETIMEDOUT, "timed out")


def test_a_host_that_is_silent_fails_what_is_in_flight_with_a_reason_of_its_own() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        stream = DirectStream(SilentHost(fileno=ours.detach()), "worker:1")
        send(stream, 1)
        with pytest.raises(Unavailable) as broken:
            stream.receive(1, WAIT_S)
    assert broken.value.reason == HOST_SILENT and stream.broken


@pytest.mark.parametrize(
    ("code", "error"), [(0, Unavailable), (1, Unavailable), (14, Unavailable), (9, FailedPrecondition)]
)
def test_a_stream_that_ends_fails_what_is_in_flight_with_what_its_status_says(
    stream: DirectStream, worker: Worker, code: int, error: type[MoesaicError]
) -> None:
    for call_id in (1, 2):
        send(stream, call_id)
    worker.take()
    worker.end(code, "for a reason")
    for call_id in (1, 2):
        with pytest.raises(error):
            stream.receive(call_id, WAIT_S)
    assert stream.broken


def test_what_was_answered_before_the_end_is_still_taken(stream: DirectStream, worker: Worker) -> None:
    for call_id in (1, 2):
        send(stream, call_id)
    worker.answer(worker.take())
    worker.end(14)
    with pytest.raises(Unavailable):
        stream.receive(2, WAIT_S)
    assert stream.receive(1, WAIT_S).response.call_id == 1


def test_goaway_ends_the_stream(stream: DirectStream, worker: Worker) -> None:
    send(stream, 1)
    worker.take()
    worker.peer.close()
    worker.flush()
    with pytest.raises(Unavailable):
        stream.receive(1, WAIT_S)
    assert stream.broken


def test_a_worker_that_does_not_keep_to_the_protocol_breaks_the_stream(
    stream: DirectStream, worker: Worker
) -> None:
    send(stream, 1)
    worker.take()
    # A frame of DATA on no stream.
    worker.connection.sendall(bytes((0, 0, 1, 0, 0, 0, 0, 0, 0, 0)))
    with pytest.raises(Unavailable):
        stream.receive(1, WAIT_S)
    assert stream.broken


@pytest.mark.parametrize(
    "message",
    [b"\xff\xff\xff", b"", expert_pb2.ComputeResponse(call_id=3).SerializeToString()],
    ids=["no protobuf", "empty", "a call that was never made"],
)
def test_a_message_that_is_no_answer_loses_all_calls(
    stream: DirectStream, worker: Worker, message: bytes
) -> None:
    for call_id in (1, 2):
        send(stream, call_id)
    worker.take()
    worker.say(message)
    for call_id in (1, 2):
        with pytest.raises(DataLoss):
            stream.receive(call_id, WAIT_S)
    assert stream.broken


def test_an_answer_whose_bytes_are_not_those_of_its_shape_loses_its_call(
    stream: DirectStream, worker: Worker
) -> None:
    send(stream, 1)
    worker.take()
    output = common_pb2.Tensor(dtype=common_pb2.DTYPE_FLOAT32, shape=[1000, 4])
    worker.reply(expert_pb2.ComputeResponse(call_id=1, output=output), b"1234")
    with pytest.raises(DataLoss):
        stream.receive(1, WAIT_S)
    assert not stream.broken


def test_close_wakes_whoever_waits_and_sends_goaway(stream: DirectStream, worker: Worker) -> None:
    send(stream, 1)
    worker.take()
    failed = threading.Event()

    def wait() -> None:
        with contextlib.suppress(Unavailable):
            stream.receive(1, WAIT_S)
            return
        failed.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    stream.close()
    assert failed.wait(WAIT_S)
    waiting.join(WAIT_S)
    stream.close()
    send(stream, 2)
    with pytest.raises(Unavailable):
        stream.receive(2, WAIT_S)
    while raw := worker.connection.recv(1 << 16):
        worker.peer.receive(raw)
    assert worker.peer.is_over


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "combine", "fits"),
    [
        (1, 1, expert_pb2.COMBINE_ROWS, True),
        (64, 64, expert_pb2.COMBINE_ROWS, True),
        (65, 65, expert_pb2.COMBINE_ROWS, False),
        (33, 66, expert_pb2.COMBINE_ROWS, False),
        (33, 66, expert_pb2.COMBINE_SUM, True),
    ],
)
def test_it_carries_what_is_small_there_and_back(
    num_tokens: int, num_rows: int, combine: expert_pb2.Combine, fits: bool
) -> None:
    hidden = torch.empty(num_tokens, MAX_ROWS_BYTES // 64 // 4)
    assert carries(expert_pb2.ComputeRequest(combine=combine), hidden, num_rows) == fits


def test_waiting_leaves_a_call_as_it_is_and_abandoning_drops_its_late_answer(
    stream: DirectStream, worker: Worker
) -> None:
    send(stream, 1)
    assert not stream.wait(1, 0.0) and stream.num_in_flight == 1
    late = worker.take()
    stream.abandon(1)
    assert stream.num_in_flight == 0
    send(stream, 2)
    worker.answer(late)
    worker.answer(worker.take())
    assert stream.wait(2, WAIT_S)
    assert stream.receive(2, 0.0).response.call_id == 2


def test_waiting_ends_when_the_stream_breaks(stream: DirectStream, worker: Worker) -> None:
    send(stream, 1)
    worker.connection.close()
    assert stream.wait(1, WAIT_S)
    with pytest.raises(Unavailable):
        stream.receive(1, 0.0)
