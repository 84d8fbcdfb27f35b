"""ExpertService: decode, check, submit, encode. The model and the threads are elsewhere.

A stream carries many calls at once, bounded; each is answered in-band, with rows or with its own error, and a refused
call never ends the stream. While the worker drains, new calls are refused and every call taken before is answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil

from expert_worker.batcher import Batcher, BatcherStats
from expert_worker.call import ROW_DTYPES, read_call
from expert_worker.expert_store import ExpertStore
from moesaic import telemetry
from moesaic.errors import InternalError, MoesaicError, Unavailable, to_status
from moesaic.families import MoeModel
from moesaic.manifest import versions_to_proto
from moesaic.tensors import to_wire
from moesaic.v1 import expert_pb2, expert_pb2_grpc

log = logging.getLogger(__name__)

SERVICE = "moesaic.v1.ExpertService"
RETRY_AFTER_S = 0.5

Answer = Callable[[expert_pb2.ComputeRequest], Awaitable[expert_pb2.ComputeResponse]]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the service serves once the weights are there."""

    name: str
    model: MoeModel
    device: str
    store: ExpertStore
    batcher: Batcher


class ExpertService(expert_pb2_grpc.ExpertServiceServicer):
    """The servicer of one worker. Until `serve` it answers Unavailable, and so it does after `drain`."""

    def __init__(self, *, worker: str, incarnation: str, max_call_rows: int, max_stream_calls: int) -> None:
        self._worker = worker
        self._incarnation = incarnation
        self._max_call_rows = max_call_rows
        self._max_stream_calls = max_stream_calls
        self._loaded: LoadedModel | None = None
        self._warm_up = BatcherStats()
        self._streams: set[_CallStream] = set()
        self._draining = False
        self._start_s = time.monotonic()
        self._calls = self._rows = self._refused_calls = 0

    def serve(self, loaded: LoadedModel) -> None:
        """From now on calls are answered; what the batcher did before was warming up and is not counted."""
        self._loaded = loaded
        self._warm_up = loaded.batcher.stats()

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new calls, answers those taken before, then ends all streams; False when the time ran out."""
        self._draining = True
        streams = list(self._streams)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(stream.answered() for stream in streams))
        except TimeoutError:
            return False
        finally:
            for stream in streams:
                stream.end()
        return True

    async def Compute(
        self, requests: AsyncIterator[expert_pb2.ComputeRequest], context: Any
    ) -> AsyncIterator[expert_pb2.ComputeResponse]:
        self._ready()
        stream = _CallStream(self._answer, self._max_stream_calls)
        self._streams.add(stream)
        try:
            async with aclosing(stream.responses(requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._streams.discard(stream)
        if self._draining:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_AFTER_S)

    async def Describe(
        self, request: expert_pb2.DescribeRequest, context: Any
    ) -> expert_pb2.DescribeResponse:
        loaded = self._ready()
        return expert_pb2.DescribeResponse(
            worker=self._worker,
            incarnation=self._incarnation,
            model=loaded.name,
            hidden_size=loaded.model.hidden_size,
            experts=versions_to_proto(loaded.store.versions()),
            dtypes=ROW_DTYPES,
            weight_bytes=loaded.store.weight_bytes,
            device=loaded.device,
        )

    async def GetWorkerStats(
        self, request: expert_pb2.GetWorkerStatsRequest, context: Any
    ) -> expert_pb2.GetWorkerStatsResponse:
        stats = expert_pb2.GetWorkerStatsResponse(
            calls=self._calls,
            rows=self._rows,
            refused_calls=self._refused_calls,
            uptime_s=time.monotonic() - self._start_s,
            resident_bytes=psutil.Process().memory_info().rss,
        )
        if self._loaded is not None:
            batcher = self._loaded.batcher.stats()
            stats.passes = batcher.passes - self._warm_up.passes
            stats.busy_s = batcher.busy_s - self._warm_up.busy_s
        return stats

    def _ready(self) -> LoadedModel:
        if self._draining:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_AFTER_S)
        if self._loaded is None:
            raise Unavailable("the worker is loading", retry_after_s=RETRY_AFTER_S)
        return self._loaded

    async def _answer(self, request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
        """The response to one call; never raises."""
        try:
            with _compute_span(request, self._worker):
                return await self._compute(request)
        except MoesaicError as error:
            refusal = error
        except Exception:
            log.exception("a call failed", extra={"fields": {"layer": request.layer}})
            refusal = InternalError("internal error")
        self._refused_calls += 1
        return expert_pb2.ComputeResponse(
            call_id=request.call_id, epoch=request.epoch, error=to_status(refusal)
        )

    async def _compute(self, request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
        start_s = time.monotonic()
        loaded = self._ready()
        call = read_call(
            request,
            model=loaded.model,
            store=loaded.store,
            max_rows=self._max_call_rows,
            now_s=start_s,
        )
        decoded_s = time.monotonic()
        computed = await loaded.batcher.submit(call)
        computed_s = time.monotonic()
        output = to_wire(computed.output)
        self._calls += 1
        self._rows += call.num_rows
        return expert_pb2.ComputeResponse(
            call_id=request.call_id,
            epoch=request.epoch,
            versions=[group.version for group in request.experts],
            output=output,
            timing=expert_pb2.ComputeTiming(
                decode_us=_us(decoded_s - start_s),
                queue_us=_us(computed.queue_s),
                compute_us=_us(computed.compute_s),
                encode_us=_us(time.monotonic() - computed_s),
            ),
        )


class _CallStream:
    """The calls of one stream: at most `limit` of them are read and not yet written back."""

    def __init__(self, answer: Answer, limit: int) -> None:
        self._answer = answer
        self._places = asyncio.Semaphore(limit)
        self._running: set[asyncio.Task[None]] = set()
        # Bounded by the places; None ends the stream.
        self._responses: asyncio.Queue[expert_pb2.ComputeResponse | None] = asyncio.Queue()

    async def responses(
        self, requests: AsyncIterator[expert_pb2.ComputeRequest]
    ) -> AsyncGenerator[expert_pb2.ComputeResponse, None]:
        """Answers in the order in which they are ready, until the caller has ended its side and has them all."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._responses.get()) is not None:
                yield response
                self._places.release()
            if reader.done():
                await reader
        finally:
            for task in (reader, *self._running):
                task.cancel()

    async def answered(self) -> None:
        """Returns when every call taken so far has its response queued."""
        if running := list(self._running):
            await asyncio.wait(running)

    def end(self) -> None:
        """Lets `responses` end after the responses that are queued."""
        self._responses.put_nowait(None)

    async def _read(self, requests: AsyncIterator[expert_pb2.ComputeRequest]) -> None:
        try:
            async for request in requests:
                await self._places.acquire()
                task = asyncio.create_task(self._respond(request))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            await self.answered()
        finally:
            self.end()

    async def _respond(self, request: expert_pb2.ComputeRequest) -> None:
        self._responses.put_nowait(await self._answer(request))


def _compute_span(request: expert_pb2.ComputeRequest, worker: str) -> AbstractContextManager[object]:
    """A child of the caller's span, or nothing when the caller records none."""
    if not request.traceparent:
        return nullcontext()
    return telemetry.TRACER.start_as_current_span(
        telemetry.SPAN_COMPUTE,
        context=telemetry.extract([("traceparent", request.traceparent)]),
        attributes={
            telemetry.LAYER: request.layer,
            telemetry.ROWS: sum(len(group.rows) for group in request.experts),
            telemetry.WORKER: worker,
            telemetry.EPOCH: request.epoch,
        },
    )


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
