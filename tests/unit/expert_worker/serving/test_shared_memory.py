"""The worker's end of shared memory, in this process: a compute thread, the socket, and routers that come and go."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.expert_calls import ReferenceExperts, compute_request, versions_of
from support.gated_computing import Gate

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.experts.store import ExpertStore
from expert_worker.serving.call_handler import CallHandler
from expert_worker.serving.shared_memory import SharedMemoryServer
from moesaic import telemetry
from moesaic.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, MoesaicError, Unavailable
from moesaic.families import MoeModel
from moesaic.transports import shared_memory
from moesaic.transports.shared_memory import Frame
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.tensors import decode_rows, encode_rows
from router.workers.transports.base import WorkerAnswer
from router.workers.transports.shared_memory import SharedMemoryTransport, connect

WAIT_S = 10.0
HIDDEN = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
MakeCall = Callable[..., expert_pb2.ComputeRequest]


class Worker:
    def __init__(self, model: MoeModel, store: ExpertStore) -> None:
        self.gate = Gate()
        self.batcher = Batcher(self.gate, max_queued_calls=4, max_pass_rows=64)
        self.handler = CallHandler(worker="w", max_call_rows=64)
        self.handler.open(model, store)
        self.server = SharedMemoryServer(self.handler, incarnation="i")

    @property
    def path(self) -> str:
        return self.server.path_for(shared_memory.host_id(), shared_memory.VERSION)

    @contextmanager
    def link(self) -> Iterator[SharedMemoryTransport]:
        link = connect(self.path, "i")
        yield link
        link.close()

    async def stop(self) -> None:
        self.gate.open.set()
        await self.batcher.stop(5)
        self.server.close()


@pytest.fixture
async def worker(model: MoeModel, store: ExpertStore) -> AsyncIterator[Worker]:
    worker = Worker(model, store)
    worker.batcher.start()
    worker.server.open(worker.batcher)
    yield worker
    await worker.stop()


@pytest.fixture
def make_call(store: ExpertStore) -> MakeCall:
    def make(rows: dict[int, list[int]], **fields: Any) -> expert_pb2.ComputeRequest:
        return compute_request(fields.pop("hidden", HIDDEN), rows, versions_of(store), **fields)

    return make


def send(link: SharedMemoryTransport, request: expert_pb2.ComputeRequest) -> None:
    """`request` with its data: over shared memory they travel apart."""
    hidden = torch.frombuffer(bytearray(request.hidden.data), dtype=torch.uint8)
    request.hidden.ClearField("data")
    link.send(request, hidden)


def ask(link: SharedMemoryTransport, request: expert_pb2.ComputeRequest) -> WorkerAnswer:
    send(link, request)
    return link.receive(request.call_id, WAIT_S)


def test_a_call_comes_back_computed(worker: Worker, make_call: MakeCall, folder: Path) -> None:
    rows = {2: [0, 3], 0: [1, 2, 3, 5]}
    with worker.link() as link:
        answer = ask(link, make_call(rows, layer=1, call_id=77))
        expected = ReferenceExperts(folder).rows(1, HIDDEN, rows)
        torch.testing.assert_close(answer.output, expected, atol=1e-5, rtol=1e-5)
        assert (answer.response.call_id, answer.response.epoch) == (77, "epoch-1")
        assert len(answer.response.versions) == 2
        assert answer.response.timing.compute_us > 0
        assert (worker.handler.calls, worker.handler.rows) == (1, 6)


def test_sums_and_many_rows_come_back_as_well(worker: Worker, make_call: MakeCall) -> None:
    every = list(range(6))
    with worker.link() as link:
        summed = ask(link, make_call({0: [0, 5]}, weights={0: [0.5, 2.0]})).output.clone()
        assert summed.shape == (6, 32) and not summed[1:5].any()
        assert ask(link, make_call({0: every, 1: every, 2: every}, call_id=2)).output.shape == (18, 32)


@pytest.mark.parametrize("dtype", [common_pb2.DTYPE_INT8, common_pb2.DTYPE_BFLOAT16])
def test_narrow_rows_are_answered_in_kind(
    worker: Worker, make_call: MakeCall, folder: Path, dtype: common_pb2.Dtype
) -> None:
    request = make_call({0: [0, 5], 1: [2]})
    header, rows = encode_rows(HIDDEN, dtype)
    request.hidden.CopyFrom(header)
    with worker.link() as link:
        link.send(request, rows)
        answer = link.receive(1, WAIT_S)
        output = decode_rows(answer.response.output, answer.output).float()
    assert answer.response.output.dtype == dtype
    expected = ReferenceExperts(folder).rows(0, HIDDEN, {0: [0, 5], 1: [2]})
    assert torch.nn.functional.cosine_similarity(output.flatten(), expected.flatten(), dim=0) > 0.98


def test_wrong_calls_are_refused_one_by_one_and_the_connection_goes_on(
    worker: Worker, make_call: MakeCall
) -> None:
    wrong: list[tuple[expert_pb2.ComputeRequest, type[MoesaicError]]] = [
        (make_call({3: [0]}), FailedPrecondition),
        (make_call({}), InvalidArgument),
        (make_call({0: [9]}), InvalidArgument),
        (make_call({0: [0]}, timeout_ms=0), DeadlineExceeded),
        (make_call({0: [0]}, hidden=torch.full((1, 32), float("nan"))), InvalidArgument),
        (make_call({0: [0]}, hidden=HIDDEN[:, :31]), InvalidArgument),
    ]
    with worker.link() as link:
        for request, error in wrong:
            with pytest.raises(error):
                ask(link, request)
        assert ask(link, make_call({0: [0]})).output.shape == (1, 32)
    assert (worker.handler.calls, worker.handler.refused_calls) == (1, 6)


def test_calls_of_several_connections_share_a_pass(worker: Worker, make_call: MakeCall, folder: Path) -> None:
    shares = ({0: [0, 1], 1: [2]}, {1: [3, 4], 0: [5]})
    with worker.link() as blocker, worker.link() as first, worker.link() as second:
        worker.gate.close_behind(partial(send, blocker, make_call({0: [0]}, layer=1)))
        for link, rows in zip((first, second), shares, strict=True):
            send(link, make_call(rows))
        worker.gate.open.set()
        for link, rows in zip((first, second), shares, strict=True):
            expected = ReferenceExperts(folder).rows(0, HIDDEN, rows)
            output = link.receive(1, WAIT_S).output
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        blocker.receive(1, WAIT_S)
    assert worker.gate.passes == [1, 2]


async def test_calls_over_shared_memory_and_of_a_stream_share_a_pass(
    worker: Worker, make_call: MakeCall
) -> None:
    with worker.link() as blocker, worker.link() as link:
        worker.gate.close_behind(partial(send, blocker, make_call({0: [0]}, layer=1)))
        send(link, make_call({0: [0]}))
        call = ExpertCall(0, HIDDEN, (), (), torch.empty(0, dtype=torch.int64), None, float("inf"))
        waiting = asyncio.create_task(worker.batcher.submit(call))
        await asyncio.sleep(0)
        worker.gate.open.set()
        with pytest.raises(MoesaicError):  # it has no experts: the pass fails, for both
            await waiting
        with pytest.raises(MoesaicError):
            link.receive(1, WAIT_S)
    assert worker.gate.passes == [1, 2]


def test_the_time_in_the_socket_counts_as_waiting_in_the_queue(worker: Worker, make_call: MakeCall) -> None:
    with worker.link() as blocker, worker.link() as link:
        worker.gate.close_behind(partial(send, blocker, make_call({0: [0]})))
        send(link, make_call({0: [0]}))
        assert not worker.gate.open.wait(0.02)
        worker.gate.open.set()
        assert link.receive(1, WAIT_S).response.timing.queue_us > 15_000
        assert blocker.receive(1, WAIT_S).response.timing.queue_us < 15_000


def test_a_call_whose_time_ended_in_the_socket_is_not_computed(worker: Worker, make_call: MakeCall) -> None:
    with worker.link() as blocker, worker.link() as link:
        worker.gate.close_behind(partial(send, blocker, make_call({0: [0]})))
        send(link, make_call({0: [0]}, timeout_ms=1))
        assert not worker.gate.open.wait(0.01)
        worker.gate.open.set()
        with pytest.raises(DeadlineExceeded):
            link.receive(1, WAIT_S)
    assert worker.gate.passes == [1]


def test_a_router_that_goes_takes_its_calls_along(worker: Worker, make_call: MakeCall) -> None:
    with worker.link() as blocker, worker.link() as staying:
        with worker.link() as gone:
            worker.gate.close_behind(partial(send, blocker, make_call({0: [0]})))
            send(gone, make_call({0: [0]}))
        send(staying, make_call({0: [0]}))
        worker.gate.open.set()
        assert staying.receive(1, WAIT_S).output.shape == (1, 32)
        assert blocker.receive(1, WAIT_S).output.shape == (1, 32)
    assert worker.handler.calls == 2 and worker.gate.passes == [1, 1]


def enter(worker: Worker) -> socket.socket:
    connection = shared_memory.frame_socket()
    connection.settimeout(WAIT_S)
    connection.connect(worker.path)
    assert shared_memory.decode_handshake(connection.recv(shared_memory.HANDSHAKE_BYTES))[0] == "i"
    return connection


def offered(frame: Frame, content: bytes = b"", num_bytes: int = 4096) -> tuple[bytes, list[Any]]:
    """A frame that brings a buffer with this content."""
    buffer, fd = shared_memory.make_buffer(num_bytes)
    buffer.bytes[: len(content)] = content
    return shared_memory.encode_frame(frame), [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]


GOOD = Frame(0, 16, 64, 128, 0)


@pytest.mark.parametrize(
    "garbage",
    [
        lambda: (b"x", []),
        lambda: (bytes(4096), []),
        lambda: (shared_memory.encode_frame(GOOD), []),
        lambda: offered(GOOD._replace(buffer=shared_memory.MAX_BUFFERS)),
        lambda: offered(GOOD._replace(buffer=2**64 - 1)),
        lambda: offered(GOOD._replace(message_bytes=2**63)),
        lambda: offered(GOOD._replace(data_offset=2**63, data_bytes=2**63)),
        lambda: offered(GOOD._replace(data_bytes=5000)),
        lambda: offered(GOOD, b"\xff" * 16),
    ],
)
def test_a_caller_that_sends_garbage_is_cut_off_and_the_worker_lives(
    worker: Worker, make_call: MakeCall, garbage: Callable[[], tuple[bytes, list[Any]]]
) -> None:
    with worker.link() as link, enter(worker) as connection:
        raw, rights = garbage()
        connection.sendmsg([raw], rights)
        for _, _, fds in rights:
            os.close(fds[0])
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        assert ask(link, make_call({0: [0]})).output.shape == (1, 32)
    assert worker.batcher.is_healthy()


def test_a_buffer_that_is_in_use_is_not_taken_twice(worker: Worker, make_call: MakeCall) -> None:
    request = make_call({0: [0]}, layer=1)
    data = bytes(request.hidden.data)
    request.hidden.ClearField("data")
    message = request.SerializeToString()
    offset = shared_memory.align(len(message) + 4096)
    frame = Frame(0, len(message), offset, len(data), 2**62)
    with worker.link() as blocker, enter(worker) as connection:
        worker.gate.close_behind(partial(send, blocker, make_call({0: [0]})))
        raw, rights = offered(frame, message + bytes(offset - len(message)) + data, 1 << 16)
        connection.sendmsg([raw], rights)
        connection.send(shared_memory.encode_frame(frame))
        os.close(rights[0][2][0])
        worker.gate.open.set()
        assert blocker.receive(1, WAIT_S)
        # The second frame comes either after the first answer, which is fine, or before it, which is not.
        first = connection.recv(shared_memory.FRAME_BYTES)
        assert first == b"" or shared_memory.decode_frame(first).buffer == 0
        assert ask(blocker, make_call({0: [0]}, call_id=2))


@given(st.lists(st.binary(min_size=1, max_size=64), max_size=4), st.binary(max_size=400))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_in_frames_or_buffers_end_the_worker(
    worker: Worker, frames: list[bytes], content: bytes
) -> None:
    with enter(worker) as connection:
        raw, rights = offered(Frame(0, len(content), 448, 128, 2**63), content)
        try:
            connection.sendmsg([raw], rights)
            for frame in frames:
                connection.send(frame)
        except OSError:
            pass
        os.close(rights[0][2][0])
    assert worker.batcher.is_healthy()


def test_an_answer_without_room_cuts_the_connection_off(worker: Worker, make_call: MakeCall) -> None:
    request = make_call({0: list(range(6)), 1: list(range(6))})
    data = bytes(request.hidden.data)
    request.hidden.ClearField("data")
    message = request.SerializeToString()
    offset = shared_memory.align(len(message))
    frame = Frame(0, len(message), offset, len(data), 2**62)
    with enter(worker) as connection:
        raw, rights = offered(frame, message + bytes(offset - len(message)) + data, offset + len(data))
        connection.sendmsg([raw], rights)
        os.close(rights[0][2][0])
        assert connection.recv(1) == b""


def test_only_this_user_may_enter(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(worker.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(shared_memory, "is_ours", lambda _: False)
    with shared_memory.frame_socket() as connection:
        connection.settimeout(WAIT_S)
        connection.connect(worker.path)
        assert connection.recv(1) == b""


def test_another_host_and_another_version_get_no_shared_memory(worker: Worker) -> None:
    assert worker.path
    assert worker.server.path_for("other", shared_memory.VERSION) == ""
    assert worker.server.path_for("", shared_memory.VERSION) == ""
    assert worker.server.path_for(shared_memory.host_id(), shared_memory.VERSION + 1) == ""


def test_a_closed_handler_refuses_in_band(worker: Worker, make_call: MakeCall) -> None:
    with worker.link() as link:
        worker.handler.close()
        with pytest.raises(Unavailable):
            ask(link, make_call({0: [0]}))


async def test_the_end_of_the_batcher_ends_connections_and_leaves_no_folder(
    worker: Worker, make_call: MakeCall
) -> None:
    folder = Path(worker.path).parent
    with worker.link() as link:
        worker.gate.close_behind(partial(send, link, make_call({0: [0]}, call_id=1)))
        send(link, make_call({0: [0]}, layer=1, call_id=2))
        worker.gate.open.set()
        assert await worker.batcher.stop(5)
        assert link.receive(1, WAIT_S).output.shape == (1, 32)
        with pytest.raises(Unavailable):
            link.receive(2, WAIT_S)
    assert not folder.exists() and worker.path == ""


async def test_where_the_temporary_folder_has_too_long_a_name_there_is_no_shared_memory(
    model: MoeModel, store: ExpertStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    worker = Worker(model, store)
    worker.batcher.start()
    worker.server.open(worker.batcher)
    assert worker.path == "" and not list(deep.iterdir())
    await worker.stop()


def test_a_call_that_is_traced_has_a_span_under_the_callers(
    worker: Worker, make_call: MakeCall, spans: InMemorySpanExporter
) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with worker.link() as link:
        ask(link, make_call({0: [0, 1], 1: [2]}, layer=1, traceparent=traceparent))
        with pytest.raises(MoesaicError):
            ask(link, make_call({3: [0]}, traceparent=traceparent, call_id=2))
        ask(link, make_call({0: [0]}, call_id=3))
    good, refused = spans.get_finished_spans()
    assert good.context is not None and good.parent is not None and good.attributes is not None
    assert f"{good.parent.span_id:016x}" == "b7ad6b7169203331"
    assert (good.attributes[telemetry.LAYER], good.attributes[telemetry.ROWS]) == (1, 3)
    assert good.status.is_ok or good.status.is_unset
    assert not refused.status.is_ok and not refused.events
