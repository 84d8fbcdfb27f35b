"""The service over a real socket: every call is answered in-band, and nothing that a caller sends ends the worker."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.expert_calls import ReferenceExperts, compute_request, experts_of, versions_of
from support.gated_computing import Gate
from support.wire_tensors import from_wire, to_wire

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.compute_pass import compute_calls
from expert_worker.experts.store import ExpertStore, HeldExpert
from expert_worker.serving.call_handler import CallHandler
from expert_worker.serving.grpc_stream import CallStream
from expert_worker.serving.service import ExpertService, LoadedModel
from moesaic import rpc, telemetry
from moesaic.epoch import ExpertAddress
from moesaic.errors import from_rpc_error, from_status
from moesaic.families import MoeModel
from moesaic.transports import shared_memory
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from moesaic.wire.messages import Framed
from router.workers.transports.shared_memory import connect

HIDDEN = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
Stream = Any


async def close_behind(gate: Gate, stream: Stream, request: expert_pb2.ComputeRequest) -> None:
    """Sends a call that occupies the compute thread."""
    gate.close()
    await stream.write(request)
    assert await asyncio.to_thread(gate.entered.wait, 5)


class Worker:
    """A worker in this process: service, compute thread and server, without the loading."""

    def __init__(self, model: MoeModel, store: ExpertStore) -> None:
        self.gate = Gate()
        self.batcher = Batcher(self.gate, max_queued_calls=4, max_pass_rows=64)
        self.service = ExpertService(
            worker="w",
            incarnation="i",
            max_call_rows=64,
            max_stream_calls=8,
            shared_memory=True,
            direct_host="127.0.0.1",
        )
        self._loaded = LoadedModel("tiny", model, "cpu", store, self.batcher, lambda: 12345)
        self._server = rpc.Server({rpc.EXPERT_SERVICE: self.service.add_to})

    async def start(self) -> str:
        self.batcher.start()
        return f"127.0.0.1:{await self._server.start('127.0.0.1', 0)}"

    def serve(self) -> None:
        self.service.serve(self._loaded)

    def has_direct_call(self) -> bool:
        """Whether one has come that the compute thread has not read yet."""
        assert self.service._direct_server is not None
        return bool(select.select(list(self.service._direct_server._connections), [], [], 0)[0])

    async def stop(self) -> None:
        self.gate.open.set()
        await self.batcher.stop(5)
        self.service.close()
        await self._server.stop(0)


@pytest.fixture
async def worker(model: MoeModel, store: ExpertStore) -> AsyncIterator[Worker]:
    worker = Worker(model, store)
    yield worker
    await worker.stop()


@pytest.fixture
async def channel(worker: Worker) -> AsyncIterator[grpc.aio.Channel]:
    async with rpc.aio_channel(await worker.start()) as channel:
        worker.serve()
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return expert_pb2_grpc.ExpertServiceStub(channel)


@pytest.fixture
def request_of(store: ExpertStore) -> Callable[..., expert_pb2.ComputeRequest]:
    def make(rows: dict[int, list[int]], **fields: Any) -> expert_pb2.ComputeRequest:
        return compute_request(fields.pop("hidden", HIDDEN), rows, versions_of(store), **fields)

    return make


async def call(stream: Stream, request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
    await stream.write(request)
    response: expert_pb2.ComputeResponse = await asyncio.wait_for(stream.read(), 10)
    return response


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await condition():
            await asyncio.sleep(0.005)


RequestOf = Callable[..., expert_pb2.ComputeRequest]


async def test_an_answer_holds_the_rows_and_says_what_computed_them(
    stub: Any, request_of: RequestOf, store: ExpertStore, folder: Path
) -> None:
    rows = {2: [0, 3], 0: [1, 2, 3, 5]}
    response = await call(stub.Compute(), request_of(rows, layer=1, call_id=77))
    assert not response.HasField("error")
    assert (response.call_id, response.epoch) == (77, "epoch-1")
    assert list(response.versions) == [versions_of(store)[1, 2], versions_of(store)[1, 0]]  # type: ignore[index]
    expected = ReferenceExperts(folder).rows(1, HIDDEN, rows)
    torch.testing.assert_close(from_wire(response.output), expected, atol=1e-5, rtol=1e-5)
    assert response.timing.compute_us > 0


async def test_a_sum_comes_back_with_a_row_per_token(stub: Any, request_of: RequestOf) -> None:
    response = await call(stub.Compute(), request_of({0: [0, 5]}, weights={0: [0.5, 2.0]}))
    assert list(response.output.shape) == [6, 32]
    assert not from_wire(response.output)[1:5].any()


async def test_many_calls_of_one_stream_are_in_flight_and_paired_by_id(
    stub: Any, request_of: RequestOf, folder: Path
) -> None:
    stream = stub.Compute()
    for call_id in range(4):
        await stream.write(request_of({0: [call_id]}, call_id=call_id, layer=call_id % 2))
    await stream.done_writing()
    answers = {response.call_id: from_wire(response.output) async for response in stream}
    assert answers.keys() == set(range(4))
    reference = ReferenceExperts(folder)
    for call_id, output in answers.items():
        expected = reference.rows(call_id % 2, HIDDEN, {0: [call_id]})
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


async def test_wrong_calls_are_answered_one_by_one_and_the_stream_goes_on(
    stub: Any, request_of: RequestOf
) -> None:
    good = request_of({0: [0]})
    wrong_version, not_held, no_experts = request_of({0: [0]}), request_of({3: [0]}), request_of({})
    wrong_version.experts[0].version = bytes(32)
    late = request_of({0: [0]}, timeout_ms=0)
    odd = request_of({0: [0]}, hidden=torch.full((1, 32), float("nan")))
    stream = stub.Compute()
    seen = []
    for request in (wrong_version, not_held, no_experts, late, odd, good):
        response = await call(stream, request)
        error = from_status(response.error)
        seen.append((error.code.name, error.reason) if response.HasField("error") else "answered")
        assert response.HasField("error") != response.HasField("output")
    assert seen == [
        ("FAILED_PRECONDITION", "WRONG_VERSION"),
        ("FAILED_PRECONDITION", "NOT_HELD"),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        "answered",
    ]


async def test_bytes_that_are_no_message_end_their_stream_and_nothing_else(
    channel: grpc.aio.Channel, stub: Any, request_of: RequestOf
) -> None:
    good = stub.Compute()
    raw = channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")()
    await raw.write(b"\xff\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(raw.read(), 10)
        await raw.code()
    assert (await call(good, request_of({0: [0]}))).HasField("output")


async def test_concurrent_callers_share_a_pass_and_each_gets_its_own_rows(
    worker: Worker, stub: Any, request_of: RequestOf, folder: Path
) -> None:
    blocker, first, second = stub.Compute(), stub.Compute(), stub.Compute()
    await close_behind(worker.gate, blocker, request_of({0: [0]}, layer=1))
    await first.write(request_of({0: [0, 1], 1: [2]}))
    await second.write(request_of({1: [3, 4], 0: [5]}))
    await eventually(lambda: asyncio.sleep(0, len(worker.batcher._waiting) == 2))
    worker.gate.open.set()
    reference = ReferenceExperts(folder)
    for stream, rows in ((first, {0: [0, 1], 1: [2]}), (second, {1: [3, 4], 0: [5]})):
        response = await asyncio.wait_for(stream.read(), 10)
        torch.testing.assert_close(
            from_wire(response.output), reference.rows(0, HIDDEN, rows), atol=1e-5, rtol=1e-5
        )
    stats = await stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest())
    assert (stats.calls, stats.passes, stats.rows) == (3, 2, 7)


async def test_callers_of_all_three_ways_share_a_pass_and_are_counted_apart(
    worker: Worker, stub: Any, request_of: RequestOf, folder: Path
) -> None:
    opened = await stub.OpenTransports(
        expert_pb2.OpenTransportsRequest(
            host_id=shared_memory.host_id(), shared_memory_version=shared_memory.VERSION
        )
    )
    over_shared_memory = await asyncio.to_thread(connect, opened.socket_path, "i")
    async with rpc.aio_channel(f"127.0.0.1:{opened.direct_port}") as direct_channel:
        blocker, over_grpc = stub.Compute(), stub.Compute()
        direct = expert_pb2_grpc.ExpertServiceStub(direct_channel).Compute()
        await direct.wait_for_connection()
        await close_behind(worker.gate, blocker, request_of({0: [0]}, layer=1))
        rows = ({0: [0, 1], 1: [2]}, {1: [3, 4], 0: [5]}, {2: [0]})
        await over_grpc.write(request_of(rows[0]))
        await direct.write(request_of(rows[1]))
        by_shared_memory = request_of(rows[2])
        by_shared_memory.hidden.ClearField("data")
        over_shared_memory.send(by_shared_memory, HIDDEN)
        await eventually(lambda: asyncio.sleep(0, len(worker.batcher._waiting) == 1))
        await eventually(lambda: asyncio.sleep(0, worker.has_direct_call()))
        worker.gate.open.set()
        outputs = [
            from_wire((await asyncio.wait_for(over_grpc.read(), 10)).output),
            from_wire((await asyncio.wait_for(direct.read(), 10)).output),
            (await asyncio.to_thread(over_shared_memory.receive, 1, 10)).output,
        ]
        reference = ReferenceExperts(folder)
        for output, wanted in zip(outputs, rows, strict=True):
            torch.testing.assert_close(output, reference.rows(0, HIDDEN, wanted), atol=1e-5, rtol=1e-5)
        stats = await stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest())
        assert (stats.calls, stats.passes, stats.shared_memory_calls, stats.direct_calls) == (4, 2, 1, 1)
    over_shared_memory.close()


async def test_all_three_ways_take_two_versions_of_a_slot_and_slots_above_those_of_the_model(
    model: MoeModel, store: ExpertStore, folder: Path
) -> None:
    """As a batch of two epochs asks for them, one of which has a slot more."""
    held = experts_of(store)
    two = ExpertStore()
    # By slot and version: which expert of the model computes.
    places = {(1, b"1" * 32): 1, (1, b"2" * 32): 0, (9, b"3" * 32): 2}
    for (slot, version), expert in places.items():
        two.add(ExpertAddress(0, slot), HeldExpert(version, held[ExpertAddress(0, expert)]))
    request = compute_request(HIDDEN, {}, {})
    request.epoch = "first,second"
    for slot, version in places:
        request.experts.add(slot=slot, version=version, rows=[1, 4])
    expected = torch.cat(
        [ReferenceExperts(folder).rows(0, HIDDEN, {expert: [1, 4]}) for expert in places.values()]
    )
    worker = Worker(model, two)
    async with rpc.aio_channel(await worker.start()) as channel:
        worker.serve()
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        opened = await stub.OpenTransports(
            expert_pb2.OpenTransportsRequest(
                host_id=shared_memory.host_id(), shared_memory_version=shared_memory.VERSION
            )
        )
        async with rpc.aio_channel(f"127.0.0.1:{opened.direct_port}") as direct_channel:
            direct = expert_pb2_grpc.ExpertServiceStub(direct_channel).Compute()
            answers = [await call(stub.Compute(), request), await call(direct, request)]
        over_shared_memory = await asyncio.to_thread(connect, opened.socket_path, "i")
        request.hidden.ClearField("data")
        over_shared_memory.send(request, HIDDEN)
        third = await asyncio.to_thread(over_shared_memory.receive, 1, 10)
        over_shared_memory.close()
    await worker.stop()
    for answer in answers:
        assert (answer.epoch, list(answer.versions)) == ("first,second", [version for _, version in places])
        torch.testing.assert_close(from_wire(answer.output), expected, atol=1e-5, rtol=1e-5)
    assert third.response.epoch == "first,second"
    torch.testing.assert_close(third.output, expected, atol=1e-5, rtol=1e-5)


async def test_a_full_queue_is_refused_in_band_with_a_time_to_retry(
    worker: Worker, stub: Any, request_of: RequestOf
) -> None:
    stream = stub.Compute()
    await close_behind(worker.gate, stream, request_of({0: [0]}, call_id=100))
    for call_id in range(5):
        await stream.write(request_of({0: [0]}, call_id=call_id))
    refused = await asyncio.wait_for(stream.read(), 10)
    error = from_status(refused.error)
    assert (refused.call_id, error.code, bool(error.retry_after_s)) == (
        4,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        True,
    )
    worker.gate.open.set()
    answered = [await asyncio.wait_for(stream.read(), 10) for _ in range(5)]
    assert sorted(response.call_id for response in answered) == [0, 1, 2, 3, 100]
    assert all(response.HasField("output") for response in answered)


async def test_a_caller_that_reads_nothing_is_not_read_from_for_ever() -> None:
    taken = 0

    async def requests() -> AsyncIterator[Framed[expert_pb2.ComputeRequest]]:
        nonlocal taken
        for taken in range(1, 101):
            yield Framed(expert_pb2.ComputeRequest(call_id=taken), memoryview(b""))

    handler = CallHandler(worker="w", max_call_rows=64)  # it never opens: every call is refused
    batcher = Batcher(compute_calls, max_queued_calls=4, max_pass_rows=64)
    responses = CallStream(handler, batcher, limit=5).responses(requests())
    first = await anext(responses)
    await asyncio.sleep(0.02)
    assert taken <= 6
    rest = [response.message.call_id async for response in responses]
    assert [first.message.call_id, *rest] == list(range(1, 101))


async def test_a_caller_that_hangs_up_leaves_no_call_behind(
    worker: Worker, stub: Any, request_of: RequestOf
) -> None:
    blocker, gone = stub.Compute(), stub.Compute()
    await close_behind(worker.gate, blocker, request_of({0: [0]}))
    await gone.write(request_of({0: [1]}))
    await eventually(lambda: asyncio.sleep(0, len(worker.batcher._waiting) == 1))
    gone.cancel()
    await eventually(lambda: asyncio.sleep(0, not worker.batcher._waiting))
    worker.gate.open.set()
    assert (await asyncio.wait_for(blocker.read(), 10)).HasField("output")


async def test_calls_of_routers_that_are_gone_are_not_computed_whichever_way_they_came(
    worker: Worker, stub: Any, request_of: RequestOf
) -> None:
    opened = await stub.OpenTransports(
        expert_pb2.OpenTransportsRequest(
            host_id=shared_memory.host_id(), shared_memory_version=shared_memory.VERSION
        )
    )
    over_shared_memory = await asyncio.to_thread(connect, opened.socket_path, "i")
    blocker, over_grpc = stub.Compute(), stub.Compute()
    async with rpc.aio_channel(f"127.0.0.1:{opened.direct_port}") as direct_channel:
        direct = expert_pb2_grpc.ExpertServiceStub(direct_channel).Compute()
        await direct.wait_for_connection()
        await close_behind(worker.gate, blocker, request_of({0: [0]}, layer=1))
        await over_grpc.write(request_of({0: [0]}))
        await direct.write(request_of({0: [0]}))
        for call_id in range(2):
            sent = request_of({0: [0]}, call_id=call_id)
            sent.hidden.ClearField("data")
            over_shared_memory.send(sent, HIDDEN)
        await eventually(lambda: asyncio.sleep(0, len(worker.batcher._waiting) == 1))
        await eventually(lambda: asyncio.sleep(0, worker.has_direct_call()))
        over_grpc.cancel()
        await eventually(lambda: asyncio.sleep(0, not worker.batcher._waiting))
    over_shared_memory.close()
    worker.gate.open.set()
    assert (await asyncio.wait_for(blocker.read(), 10)).HasField("output")
    assert (await call(blocker, request_of({0: [0]}, layer=1))).HasField("output")
    assert worker.gate.passes == [1, 1]


async def test_describe_tells_what_is_held(stub: Any, store: ExpertStore, model: MoeModel) -> None:
    described = await stub.Describe(expert_pb2.DescribeRequest())
    assert (described.worker, described.incarnation, described.model) == ("w", "i", "tiny")
    assert (described.hidden_size, described.device) == (32, "cpu")
    assert described.weight_bytes == 6 * model.expert_bytes(0)
    held = {(expert.address.layer, expert.address.slot): expert.digest for expert in described.experts}
    assert held == versions_of(store)
    assert len(described.dtypes) == 4
    assert described.available_bytes == 12345


async def test_statistics_count_what_was_computed_and_what_was_refused(
    stub: Any, request_of: RequestOf
) -> None:
    stream = stub.Compute()
    await call(stream, request_of({0: [0, 1], 1: [2]}))
    await call(stream, request_of({3: [0]}))
    stats = await stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest())
    assert (stats.calls, stats.rows, stats.refused_calls, stats.passes) == (1, 3, 1, 1)
    assert 0 < stats.busy_s < stats.uptime_s
    assert stats.resident_bytes > 0


async def test_a_worker_that_still_loads_is_unavailable(worker: Worker) -> None:
    async with rpc.aio_channel(await worker.start()) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        for attempt in (stub.Describe(expert_pb2.DescribeRequest()), stub.Compute().read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(attempt, 10)
            error = from_rpc_error(caught.value)
            assert (error.code, bool(error.retry_after_s)) == (grpc.StatusCode.UNAVAILABLE, True)
            assert "loading" in error.message


async def test_a_draining_worker_answers_what_it_took_and_refuses_what_comes(
    worker: Worker, stub: Any, request_of: RequestOf
) -> None:
    stream = stub.Compute()
    await close_behind(worker.gate, stream, request_of({0: [0]}, call_id=1))
    draining = asyncio.create_task(worker.service.drain(10))
    await asyncio.sleep(0)
    refused = await call(stream, request_of({0: [0]}, call_id=2))
    assert (refused.call_id, from_status(refused.error).code) == (2, grpc.StatusCode.UNAVAILABLE)
    worker.gate.open.set()
    answered = await asyncio.wait_for(stream.read(), 10)
    assert answered.call_id == 1 and answered.HasField("output")
    assert await draining
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(stream.read(), 10)
        await call(stub.Compute(), request_of({0: [0]}))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_draining_worker_answers_what_it_took_on_the_direct_port_and_then_ends_its_streams(
    worker: Worker, stub: Any, request_of: RequestOf
) -> None:
    opened = await stub.OpenTransports(expert_pb2.OpenTransportsRequest())
    async with rpc.aio_channel(f"127.0.0.1:{opened.direct_port}") as channel:
        stream = expert_pb2_grpc.ExpertServiceStub(channel).Compute()
        await close_behind(worker.gate, stream, request_of({0: [0]}, call_id=1))
        draining = asyncio.create_task(worker.service.drain(10))
        await asyncio.sleep(0)
        await stream.write(request_of({0: [0]}, call_id=2))
        assert not draining.done()
        worker.gate.open.set()
        answers = {answer.call_id: answer for answer in [await stream.read(), await stream.read()]}
        assert answers[1].HasField("output")
        assert from_status(answers[2].error).code == grpc.StatusCode.UNAVAILABLE
        assert await draining
        assert await worker.batcher.stop(5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(stream.read(), 10)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_drain_gives_up_when_its_time_is_over(
    worker: Worker, stub: Any, request_of: RequestOf
) -> None:
    stream = stub.Compute()
    await close_behind(worker.gate, stream, request_of({0: [0]}))
    assert not await worker.service.drain(0.05)


async def test_a_call_that_is_traced_has_a_span_under_the_callers(
    stub: Any, request_of: RequestOf, spans: InMemorySpanExporter
) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    stream = stub.Compute()
    await call(stream, request_of({0: [0, 1], 1: [2]}, layer=1, traceparent=traceparent))
    await call(stream, request_of({0: [0]}))
    (span,) = [span for span in spans.get_finished_spans() if span.name == telemetry.SPAN_COMPUTE]
    assert span.context is not None and span.parent is not None and span.attributes is not None
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert (span.attributes[telemetry.LAYER], span.attributes[telemetry.ROWS]) == (1, 3)


async def test_the_output_has_the_dtype_of_the_rows(stub: Any, request_of: RequestOf) -> None:
    response = await call(stub.Compute(), request_of({0: [0]}, hidden=HIDDEN.bfloat16()))
    assert response.output.dtype == to_wire(HIDDEN.bfloat16()).dtype
