"""The direct port, in this process: a compute thread, the server, and callers that speak gRPC well, badly or not at all."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import torch
from h2.config import H2Configuration
from h2.connection import H2Connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.expert_calls import ReferenceExperts, compute_request, versions_of
from support.gated_computing import Gate
from support.wire_tensors import from_wire
from torch import Tensor

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.experts.store import ExpertStore
from expert_worker.serving import direct_connection, direct_server
from expert_worker.serving.call_handler import CallHandler
from expert_worker.serving.direct_server import DirectServer
from moesaic import rpc
from moesaic.errors import MoesaicError, from_status
from moesaic.families import MoeModel
from moesaic.transports import tcp_socket
from moesaic.transports.grpc_connection import Event, GrpcConnection, MessageReceived, StreamEnded
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from moesaic.wire.messages import COMPUTE_METHOD

WAIT_S = 10.0
MAX_QUEUED_CALLS = 16
HIDDEN = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PING = b"\0\0\x08\6\0\0\0\0\0" + bytes(8)
NO_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
MakeCall = Callable[..., expert_pb2.ComputeRequest]
AnEvent = TypeVar("AnEvent", MessageReceived, StreamEnded)


class Caller:
    """A router: one connection, and its first stream, on which it sends unless another is named."""

    def __init__(self, port: int, *, receive_buffer_bytes: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(WAIT_S)
        if receive_buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.socket.connect(("127.0.0.1", port))
        self.protocol = GrpcConnection(client=True, max_message_bytes=64 << 20)
        self.stream = self.open_stream()
        # The first word: it says how much may be sent, and that the worker let us in.
        self.events: list[Event] = self.protocol.receive(self.socket.recv(1 << 16))
        self.write()

    def open_stream(self, method: str = COMPUTE_METHOD) -> int:
        stream_id = self.protocol.open_stream(method, "worker")
        self.write()
        return stream_id

    def send(self, request: expert_pb2.ComputeRequest | bytes, stream: int | None = None) -> None:
        self.say(request, stream)
        self.write()

    def say(self, request: expert_pb2.ComputeRequest | bytes, stream: int | None = None) -> None:
        """Goes out with the next `write`, in one piece with what is said besides."""
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        self.protocol.send(self.stream if stream is None else stream, raw)

    def write(self) -> None:
        self.socket.sendall(self.protocol.take_outgoing())

    def ask(self, request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
        self.send(request)
        return self.answer()

    def answer(self, stream: int | None = None) -> expert_pb2.ComputeResponse:
        """The next one of a stream."""
        message = self._next(MessageReceived, self.stream if stream is None else stream)
        return expert_pb2.ComputeResponse.FromString(message.data)

    def end(self, stream: int | None = None) -> StreamEnded:
        """How the worker ends a stream."""
        return self._next(StreamEnded, self.stream if stream is None else stream)

    def is_cut_off(self) -> bool:
        """Reads what is left; raises TimeoutError while the worker keeps the connection."""
        with suppress(ConnectionResetError):
            while self.socket.recv(1 << 16):
                pass
        return True

    def reset(self) -> None:
        """The end of a process, or of its host's patience: no GOAWAY."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _next(self, kind: type[AnEvent], stream_id: int) -> AnEvent:
        while True:
            for event in self.events:
                if isinstance(event, kind) and event.stream_id == stream_id:
                    self.events.remove(event)
                    return event
            raw = self.socket.recv(1 << 16)
            assert raw, "the worker closed the connection"
            self.events.extend(self.protocol.receive(raw))
            with suppress(ConnectionError):  # what came last is still to be read
                self.write()


class Worker:
    def __init__(self, model: MoeModel, store: ExpertStore, host: str = "127.0.0.1") -> None:
        self.gate = Gate()
        self.batcher = Batcher(self.gate, max_queued_calls=MAX_QUEUED_CALLS, max_pass_rows=64)
        self.handler = CallHandler(worker="w", max_call_rows=16384)
        self.handler.open(model, store)
        self.server = DirectServer(self.handler, host=host)

    def start(self) -> None:
        self.batcher.start()
        self.server.open(self.batcher)

    @contextmanager
    def caller(self, **options: Any) -> Iterator[Caller]:
        caller = Caller(self.server.port, **options)
        with caller.socket:
            yield caller

    @contextmanager
    def grpcio(self, host: str = "127.0.0.1") -> Iterator[Any]:
        """A caller that knows nothing of ours."""
        with rpc.channel(f"{host}:{self.server.port}") as channel:
            yield expert_pb2_grpc.ExpertServiceStub(channel)

    @contextmanager
    def enter(self) -> Iterator[socket.socket]:
        """A caller that will say what it likes."""
        with socket.create_connection(("127.0.0.1", self.server.port), WAIT_S) as connection:
            yield connection

    def num_arrived(self) -> int:
        """Connections with something that the compute thread has not read yet."""
        return len(select.select(list(self.server._connections), [], [], 0)[0])

    async def stop(self) -> None:
        self.gate.open.set()
        await self.batcher.stop(5)


@pytest.fixture
async def worker(model: MoeModel, store: ExpertStore) -> AsyncIterator[Worker]:
    worker = Worker(model, store)
    worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
def make_call(store: ExpertStore) -> MakeCall:
    def make(rows: dict[int, list[int]], **fields: Any) -> expert_pb2.ComputeRequest:
        return compute_request(fields.pop("hidden", HIDDEN), rows, versions_of(store), **fields)

    return make


def until(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends_s
        threading.Event().wait(0.002)


def error_of(response: expert_pb2.ComputeResponse) -> MoesaicError:
    assert response.HasField("error") and not response.HasField("output")
    return from_status(response.error)


def test_a_grpcio_channel_gets_its_rows_computed_and_its_stream_ended(
    worker: Worker, make_call: MakeCall, folder: Path
) -> None:
    rows = {2: [0, 3], 0: [1, 2, 3, 5]}
    with worker.grpcio() as stub:
        requests = [make_call(rows, layer=call_id % 2, call_id=call_id) for call_id in range(12)]
        answers = {answer.call_id: answer for answer in stub.Compute(iter(requests), timeout=WAIT_S)}
    assert answers.keys() == set(range(12))
    for call_id, answer in answers.items():
        expected = ReferenceExperts(folder).rows(call_id % 2, HIDDEN, rows)
        torch.testing.assert_close(from_wire(answer.output), expected, atol=1e-5, rtol=1e-5)
        assert answer.epoch == "epoch-1" and len(answer.versions) == 2 and answer.timing.compute_us > 0
    assert (worker.handler.calls, worker.handler.rows) == (12, 72)


def test_many_calls_on_several_streams_of_one_connection_are_in_flight_and_each_gets_its_own_answer(
    worker: Worker, make_call: MakeCall, folder: Path
) -> None:
    reference = ReferenceExperts(folder)
    with worker.caller() as caller:
        streams = [caller.stream, caller.open_stream(), caller.open_stream()]
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]}, layer=1, call_id=99)))
        for call_id in range(15):
            request = make_call({call_id % 3: [call_id % 6]}, layer=call_id % 2, call_id=call_id)
            caller.send(request, streams[call_id % 3])
        worker.gate.open.set()
        assert caller.answer().call_id == 99
        for index, stream in enumerate(streams):
            answers = {answer.call_id: answer for answer in (caller.answer(stream) for _ in range(5))}
            assert answers.keys() == set(range(index, 15, 3))
            for call_id, answer in answers.items():
                expected = reference.rows(call_id % 2, HIDDEN, {call_id % 3: [call_id % 6]})
                torch.testing.assert_close(from_wire(answer.output), expected, atol=1e-5, rtol=1e-5)


def test_wrong_calls_are_refused_one_by_one_and_the_stream_goes_on(
    worker: Worker, make_call: MakeCall
) -> None:
    wrong = [
        (make_call({3: [0]}), "FAILED_PRECONDITION", "NOT_HELD"),
        (make_call({}), "INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        (make_call({0: [9]}), "INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        (make_call({0: [0]}, timeout_ms=0), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        (
            make_call({0: [0]}, hidden=torch.full((1, 32), float("nan"))),
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
        ),
        (make_call({0: [0]}, hidden=HIDDEN[:, :31]), "INVALID_ARGUMENT", "INVALID_ARGUMENT"),
    ]
    with worker.caller() as caller:
        for request, code, reason in wrong:
            error = error_of(caller.ask(request))
            assert (error.code.name, error.reason) == (code, reason)
        assert caller.ask(make_call({0: [0]})).HasField("output")
    assert (worker.handler.calls, worker.handler.refused_calls) == (1, 6)


def test_any_other_method_is_not_implemented_here(worker: Worker, make_call: MakeCall) -> None:
    with worker.grpcio() as stub, worker.caller() as caller:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Describe(expert_pb2.DescribeRequest(), timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        other = caller.open_stream("/moesaic.v1.ExpertService/OpenTransports")
        assert caller.end(other).code == grpc.StatusCode.UNIMPLEMENTED.value[0]
        assert caller.ask(make_call({0: [0]})).HasField("output")


def test_bytes_that_are_no_message_end_their_stream_with_its_calls_and_nothing_else(
    worker: Worker, make_call: MakeCall
) -> None:
    with worker.caller() as caller:
        other = caller.open_stream()
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]}, call_id=1)))
        caller.say(make_call({0: [1]}, call_id=2), other)
        caller.say(make_call({0: [1]}, call_id=3))
        caller.say(b"\xff\xff\xff\xff", other)
        caller.write()
        worker.gate.open.set()
        ended = caller.end(other)
        assert (ended.code, ended.details) == (3, "the call is not a ComputeRequest")
        assert {caller.answer().call_id for _ in range(2)} == {1, 3}
    assert worker.handler.calls == 2


@pytest.mark.parametrize(
    "length", [direct_connection.MAX_EPOCH_CHARS + 1, tcp_socket.MAX_MESSAGE_BYTES - 1000]
)
def test_an_epoch_that_no_refusal_could_repeat_ends_its_stream_and_nothing_else(
    worker: Worker, make_call: MakeCall, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    with worker.caller() as caller:
        other = caller.open_stream()
        caller.send(expert_pb2.ComputeRequest(epoch="e" * length), other)
        ended = caller.end(other)
        assert (ended.code, ended.details) == (3, "epoch: longer than 1024 characters")
        assert caller.ask(make_call({0: [0]})).HasField("output")
    assert not caplog.records


def test_a_flood_that_takes_long_to_read_lets_the_passes_of_others_in(
    worker: Worker, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_connection, "MAX_READ_S", 0.0)
    monkeypatch.setattr(direct_connection, "MAX_READS", 10_000)
    monkeypatch.setattr(direct_connection, "READ_BYTES", 64)
    unread: list[int] = []

    def compute(calls: Sequence[ExpertCall]) -> list[Tensor | MoesaicError]:
        unread.append(worker.num_arrived())
        return worker.gate(calls)

    monkeypatch.setattr(worker.batcher, "_compute_calls", compute)
    with worker.caller() as flooding, worker.caller() as caller:
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]})))
        flooding.socket.sendall(PING * 1000)
        caller.send(make_call({0: [0]}))
        until(lambda: worker.num_arrived() == 2)
        worker.gate.open.set()
        for _ in range(2):
            assert caller.answer().HasField("output")
    assert unread == [0, 1]


def test_a_message_beyond_the_bound_ends_its_stream_and_nothing_else(
    worker: Worker, make_call: MakeCall
) -> None:
    with worker.caller() as caller:
        other = caller.open_stream()
        caller.send(bytes(tcp_socket.MAX_MESSAGE_BYTES + 1), other)
        assert caller.end(other).code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert caller.ask(make_call({0: [0]})).HasField("output")


def test_a_call_whose_answer_would_be_beyond_the_bound_is_refused_before_it_is_computed(
    worker: Worker, make_call: MakeCall
) -> None:
    hidden = torch.randn(12_000, 32)
    every = list(range(len(hidden)))
    with worker.caller() as caller:
        error = error_of(caller.ask(make_call({0: every, 1: every, 2: every}, hidden=hidden)))
        assert (error.code, error.field, error.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "hidden",
            "ANSWER_TOO_LARGE",
        )
        assert not worker.gate.passes
        within = caller.ask(make_call({0: every, 1: every}, hidden=hidden))
        assert list(within.output.shape) == [24_000, 32]
        weights = {slot: [1.0] * len(every) for slot in range(3)}
        summed = caller.ask(make_call(dict.fromkeys(range(3), every), hidden=hidden, weights=weights))
        assert list(summed.output.shape) == [12_000, 32]


def test_a_flood_of_calls_is_refused_beyond_the_queue(worker: Worker, make_call: MakeCall) -> None:
    with worker.caller() as caller:
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]}, call_id=1000)))
        for call_id in range(100):
            caller.send(make_call({0: [0]}, call_id=call_id))
        worker.gate.open.set()
        answers = [caller.answer() for _ in range(101)]
    refused = [error_of(answer) for answer in answers if answer.HasField("error")]
    assert refused and {error.code for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(error.retry_after_s for error in refused)
    assert len(answers) - len(refused) > MAX_QUEUED_CALLS


def test_calls_of_several_callers_share_a_pass(worker: Worker, make_call: MakeCall, folder: Path) -> None:
    shares = ({0: [0, 1], 1: [2]}, {1: [3, 4], 0: [5]})
    with worker.caller() as blocker, worker.caller() as first, worker.caller() as second:
        worker.gate.close_behind(partial(blocker.send, make_call({0: [0]}, layer=1)))
        for caller, rows in zip((first, second), shares, strict=True):
            caller.send(make_call(rows))
        until(lambda: worker.num_arrived() == 2)
        worker.gate.open.set()
        for caller, rows in zip((first, second), shares, strict=True):
            expected = ReferenceExperts(folder).rows(0, HIDDEN, rows)
            torch.testing.assert_close(from_wire(caller.answer().output), expected, atol=1e-5, rtol=1e-5)
        blocker.answer()
    assert worker.gate.passes == [1, 2]


def test_a_call_whose_time_ends_in_the_queue_is_not_computed(worker: Worker, make_call: MakeCall) -> None:
    with worker.caller() as caller:
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]}, call_id=1)))
        caller.send(make_call({0: [0]}, layer=1, call_id=2))
        caller.send(make_call({0: [0]}, call_id=3, timeout_ms=1))
        worker.gate.open.set()
        answers = {answer.call_id: answer for answer in (caller.answer() for _ in range(3))}
    assert answers[1].HasField("output") and answers[2].HasField("output")
    # Computing the second takes longer than a millisecond or does not: then the third is answered as well.
    assert answers[3].HasField("output") or error_of(answers[3]).code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_cancelled_stream_takes_its_calls_along(worker: Worker, make_call: MakeCall) -> None:
    with worker.caller() as caller:
        gone = caller.open_stream()
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]}, call_id=1)))
        caller.say(make_call({0: [0]}, layer=1, call_id=2), gone)
        caller.protocol.end_stream(gone)
        caller.write()
        worker.gate.open.set()
        assert caller.answer().call_id == 1
        assert caller.ask(make_call({0: [0]}, call_id=3)).call_id == 3
        assert worker.handler.calls == 2
        until(worker.server.is_idle)


def test_a_caller_that_is_reset_in_the_middle_of_a_call_takes_its_calls_along(
    worker: Worker, make_call: MakeCall
) -> None:
    with worker.caller() as staying, worker.caller() as gone:
        worker.gate.close_behind(partial(gone.send, make_call({0: [0]})))
        gone.send(make_call({0: [0]}))
        gone.reset()
        worker.gate.open.set()
        assert staying.ask(make_call({0: [0]})).HasField("output")
        assert worker.gate.passes == [1, 1]
        until(worker.server.is_idle)
    until(worker.batcher.is_idle)


def test_what_a_socket_does_not_take_at_once_goes_out_when_the_caller_reads(
    worker: Worker, make_call: MakeCall
) -> None:
    """Nine MiB of answers are more than the sockets of both ends hold."""
    hidden = torch.randn(6000, 32)
    request = make_call({0: list(range(6000))}, hidden=hidden)
    with worker.caller(receive_buffer_bytes=4096) as slow, worker.caller() as other:
        for call_id in range(12):
            request.call_id = call_id
            slow.send(request)
        until(lambda: worker.handler.calls == 12)
        assert not worker.server.is_idle()
        assert other.ask(make_call({0: [0]})).HasField("output")
        answers = [slow.answer() for _ in range(12)]
        assert [answer.call_id for answer in answers] == list(range(12))
        assert all(torch.equal(from_wire(answers[0].output), from_wire(one.output)) for one in answers)
        until(worker.server.is_idle)


def test_a_caller_that_does_not_read_its_answers_is_cut_off(
    worker: Worker, make_call: MakeCall, caplog: pytest.LogCaptureFixture
) -> None:
    request = make_call({0: list(range(6000))}, hidden=torch.randn(6000, 32)).SerializeToString()
    with worker.caller(receive_buffer_bytes=4096) as unread, worker.caller() as other:
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                unread.send(request)
        assert other.ask(make_call({0: [0]})).HasField("output")
    assert "a direct connection was cut off" in caplog.text
    until(worker.server.is_idle)


def test_a_caller_that_gives_no_room_for_its_answers_is_cut_off(
    worker: Worker, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets would hold them, but its flow control lets no more than the first 64 KiB of answers go."""
    monkeypatch.setattr(direct_connection, "MAX_UNSENT_BYTES", 256 << 10)
    message = make_call({0: list(range(600))}, hidden=torch.randn(600, 32)).SerializeToString()
    protocol = H2Connection(H2Configuration(client_side=True))
    protocol.initiate_connection()
    headers = {":method": "POST", ":scheme": "http", ":path": COMPUTE_METHOD, ":authority": "w"}
    protocol.send_headers(1, [*headers.items(), ("content-type", "application/grpc"), ("te", "trailers")])
    with worker.enter() as connection, pytest.raises(ConnectionError):
        connection.sendall(protocol.data_to_send())
        protocol.receive_data(connection.recv(1 << 16))
        for _ in range(1000):
            data = struct.pack(">BL", 0, len(message)) + message
            for begin in range(0, len(data), 1 << 14):
                protocol.send_data(1, data[begin : begin + (1 << 14)])
            connection.sendall(protocol.data_to_send())
    with worker.caller() as other:
        assert other.ask(make_call({0: [0]})).HasField("output")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        bytes(4096),
        # Data on a stream that nobody opened, a frame of a size that was not agreed on, headers that are none.
        HTTP2_PREFACE + NO_SETTINGS + b"\0\0\1\0\0\0\0\0\1x",
        HTTP2_PREFACE + NO_SETTINGS + b"\x20\0\0\0\0\0\0\0\1" + bytes(2 << 20),
        HTTP2_PREFACE + NO_SETTINGS + b"\0\0\4\1\4\0\0\0\1\xff\xff\xff\xff",
        # A GOAWAY.
        HTTP2_PREFACE + NO_SETTINGS + b"\0\0\x08\7\0\0\0\0\0" + bytes(8),
    ],
    ids=["http/1", "tls", "zeros", "unopened", "overlong", "headers", "goaway"],
)
def test_a_caller_that_sends_garbage_is_cut_off_and_the_worker_lives(
    worker: Worker, make_call: MakeCall, garbage: bytes
) -> None:
    with worker.caller() as caller, worker.enter() as connection:
        with suppress(ConnectionError):
            connection.sendall(garbage)
            while connection.recv(4096):
                pass
        assert caller.ask(make_call({0: [0]})).HasField("output")
    assert worker.batcher.is_healthy()


def test_half_a_frame_and_then_nothing_keeps_nobody_waiting(worker: Worker, make_call: MakeCall) -> None:
    request = make_call({0: [0]}).SerializeToString()
    with worker.caller() as half, worker.caller() as caller:
        half.protocol.send(half.stream, request)
        half.socket.sendall(half.protocol.take_outgoing()[:-100])
        assert caller.ask(make_call({0: [0]})).HasField("output")
        until(worker.server.is_idle)


def test_a_caller_that_breaks_the_protocol_takes_its_calls_along(worker: Worker, make_call: MakeCall) -> None:
    with worker.caller() as blocker, worker.caller() as broken:
        worker.gate.close_behind(partial(blocker.send, make_call({0: [0]})))
        broken.send(make_call({0: [0]}, layer=1))
        broken.socket.sendall(b"\0\0\1\0\0\0\0\0\0x")
        worker.gate.open.set()
        assert blocker.answer().HasField("output")
        assert broken.is_cut_off()
        assert blocker.ask(make_call({0: [0]}, call_id=2)).call_id == 2
    # Whether it was computed depends on how much came at once; that it is not waited for does not.
    until(worker.server.is_idle)


def test_a_protocol_that_fails_ends_its_connection_and_not_the_worker(
    worker: Worker, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with worker.caller() as caller:
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]})))
        with monkeypatch.context() as patched:
            for method in ("send", "end_stream"):
                patched.setattr(GrpcConnection, method, fail)
            worker.gate.open.set()
            until(lambda: "a call could not be answered" in caplog.text)
            patched.setattr(GrpcConnection, "receive", fail)
            caller.socket.sendall(b"x")
            assert caller.is_cut_off()
    assert worker.batcher.is_healthy()
    with worker.caller() as caller:
        assert caller.ask(make_call({0: [0]})).HasField("output")


@given(st.binary(max_size=400), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_end_the_worker(worker: Worker, garbage: bytes, greeted: bool) -> None:
    with worker.enter() as connection, suppress(OSError):
        connection.sendall((HTTP2_PREFACE + NO_SETTINGS if greeted else b"") + garbage)
    assert worker.batcher.is_healthy()


def test_a_flood_of_connections_is_bounded(
    worker: Worker, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_server, "MAX_CONNECTIONS", 2)
    with worker.caller() as caller, worker.caller() as other, worker.enter() as refused:
        with suppress(ConnectionResetError):
            assert refused.recv(1) == b""
        for let_in in (caller, other):
            assert let_in.ask(make_call({0: [0]})).HasField("output")
    until(lambda: not worker.server._connections)
    with worker.caller() as caller:
        assert caller.ask(make_call({0: [0]})).HasField("output")


def test_connections_that_ask_for_nothing_keep_no_caller_out(
    worker: Worker, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_server, "MAX_CONNECTIONS", 2)
    with worker.caller() as caller, worker.enter() as silent:
        assert silent.recv(1)
        with worker.caller() as late:
            for let_in in (caller, late):
                assert let_in.ask(make_call({0: [0]})).HasField("output")
        with suppress(ConnectionResetError):
            while silent.recv(1 << 16):
                pass


def test_a_closed_handler_refuses_in_band(worker: Worker, make_call: MakeCall) -> None:
    with worker.caller() as caller:
        worker.handler.close()
        assert error_of(caller.ask(make_call({0: [0]}))).code == grpc.StatusCode.UNAVAILABLE


async def test_the_end_of_the_batcher_answers_what_runs_refuses_what_waits_and_ends_the_streams(
    worker: Worker, make_call: MakeCall
) -> None:
    with worker.caller() as caller:
        idle = caller.open_stream()
        worker.gate.close_behind(partial(caller.send, make_call({0: [0]}, call_id=1)))
        caller.send(make_call({0: [0]}, layer=1, call_id=2))
        stopping = asyncio.create_task(worker.batcher.stop(5))
        await asyncio.sleep(0)
        worker.gate.open.set()
        assert await stopping
        assert caller.answer().HasField("output")
        # Whether the second call was read in time or not.
        with suppress(AssertionError):
            assert error_of(caller.answer()).code == grpc.StatusCode.UNAVAILABLE
        for stream in (caller.stream, idle):
            assert caller.end(stream).code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert caller.is_cut_off()
    assert worker.server.port == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::]"])
async def test_the_port_is_at_the_address_of_the_main_server(
    model: MoeModel, store: ExpertStore, make_call: MakeCall, host: str
) -> None:
    over_ipv6 = host.startswith("[")
    if over_ipv6 and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    worker = Worker(model, store, host)
    worker.start()
    with worker.grpcio("[::1]" if over_ipv6 else "127.0.0.1") as stub:
        (answer,) = stub.Compute(iter([make_call({0: [0]})]), timeout=WAIT_S)
        assert answer.HasField("output")
    await worker.stop()


async def test_where_there_can_be_no_port_a_warning_says_so(
    model: MoeModel, store: ExpertStore, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(model, store, "192.0.2.1")
    with caplog.at_level(logging.WARNING):
        worker.start()
    assert worker.server.port == 0 and "no port of the compute thread" in caplog.text
    await worker.stop()


def test_a_call_that_is_traced_has_a_span_under_the_callers(
    worker: Worker, make_call: MakeCall, spans: InMemorySpanExporter
) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with worker.caller() as caller:
        caller.ask(make_call({0: [0, 1], 1: [2]}, layer=1, traceparent=traceparent))
        error_of(caller.ask(make_call({3: [0]}, traceparent=traceparent)))
        caller.ask(make_call({0: [0]}))
    good, refused = spans.get_finished_spans()
    assert good.parent is not None and f"{good.parent.span_id:016x}" == "b7ad6b7169203331"
    assert not refused.status.is_ok
