"""ExpertService: calls in, answers out. What a call means is the desk's business, computing is the batcher's.

A stream carries many calls at once, bounded; each is answered in-band, with rows or with its own error, and a refused
call never ends the stream. While the worker drains, new calls are refused and every call taken before is answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from expert_worker.compute.batcher import Batcher, BatcherStats
from expert_worker.compute.call import ROW_DTYPES, Call
from expert_worker.compute.call_queue import Computed
from expert_worker.experts.store import ExpertStore
from expert_worker.serving.call_handler import RETRY_AFTER_S, CallDesk, OpenCall, Request, Response
from expert_worker.serving.direct_server import DirectDoor
from expert_worker.serving.shared_memory import Lanes
from moesaic.epoch import versions_to_proto
from moesaic.errors import DeadlineExceeded, MoesaicError, Unavailable
from moesaic.families import MoeModel
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from moesaic.wire import messages as wire

log = logging.getLogger(__name__)

SERVICE = "moesaic.v1.ExpertService"
DRAIN_PERIOD_S = 0.005


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the service serves once the weights are there."""

    name: str
    model: MoeModel
    device: str
    store: ExpertStore
    batcher: Batcher


class ExpertService(expert_pb2_grpc.ExpertServiceServicer):
    """The servicer of one worker. Until `serve` it answers Unavailable, and so it does after `drain`.

    With `lane` there are lanes, with `direct_host` a direct port at that address, beside it."""

    def __init__(
        self,
        *,
        worker: str,
        incarnation: str,
        max_call_rows: int,
        max_stream_calls: int,
        lane: bool,
        direct_host: str | None,
    ) -> None:
        self._worker = worker
        self._incarnation = incarnation
        self._max_stream_calls = max_stream_calls
        self._desk = CallDesk(worker=worker, max_call_rows=max_call_rows)
        self._lane_desk = CallDesk(worker=worker, max_call_rows=max_call_rows)
        self._lanes = Lanes(self._lane_desk, incarnation=incarnation) if lane else None
        self._direct_desk = CallDesk(worker=worker, max_call_rows=max_call_rows)
        self._door = None if direct_host is None else DirectDoor(self._direct_desk, host=direct_host)
        self._loaded: LoadedModel | None = None
        self._warm_up = BatcherStats()
        self._streams: set[_CallStream] = set()
        self._draining = False
        self._start_s = time.monotonic()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods. Compute takes and gives its tensors as views, with serialisers of our own."""
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(self, server)
        compute = grpc.stream_stream_rpc_method_handler(
            self.Compute,
            request_deserializer=wire.decode_request,
            response_serializer=wire.encode_response,
        )
        server.add_registered_method_handlers(SERVICE, {"Compute": compute})

    def serve(self, loaded: LoadedModel) -> None:
        """From now on calls are answered; what the batcher did before was warming up and is not counted."""
        self._loaded = loaded
        self._warm_up = loaded.batcher.stats()
        for desk in self._desks:
            desk.open(loaded.model, loaded.store)
        if self._lanes is not None:
            self._lanes.open(loaded.batcher)
        if self._door is not None:
            self._door.open(loaded.batcher)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new calls, answers those taken before, then ends all streams; False when the time ran out."""
        self._draining = True
        for desk in self._desks:
            desk.close()
        streams = list(self._streams)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(stream.answered() for stream in streams))
                while not self._compute_thread_is_done():
                    await asyncio.sleep(DRAIN_PERIOD_S)
        except TimeoutError:
            return False
        finally:
            for stream in streams:
                stream.end()
        return True

    async def Compute(self, requests: AsyncIterator[Request], context: Any) -> AsyncIterator[Response]:
        batcher = self._ready().batcher
        stream = _CallStream(self._desk, batcher, self._max_stream_calls)
        self._streams.add(stream)
        try:
            async with aclosing(stream.responses(requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._streams.discard(stream)
        if self._draining:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_AFTER_S)

    async def OpenLane(
        self, request: expert_pb2.OpenLaneRequest, context: Any
    ) -> expert_pb2.OpenLaneResponse:
        self._ready()
        path = "" if self._lanes is None else self._lanes.path_for(request.host_id, request.lane_version)
        port = 0 if self._door is None else self._door.port
        return expert_pb2.OpenLaneResponse(socket_path=path, incarnation=self._incarnation, compute_port=port)

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
        desks = self._desks
        stats = expert_pb2.GetWorkerStatsResponse(
            calls=sum(desk.calls for desk in desks),
            rows=sum(desk.rows for desk in desks),
            refused_calls=sum(desk.refused_calls for desk in desks),
            lane_calls=self._lane_desk.calls,
            direct_calls=self._direct_desk.calls,
            uptime_s=time.monotonic() - self._start_s,
            resident_bytes=psutil.Process().memory_info().rss,
        )
        if self._loaded is not None:
            batcher = self._loaded.batcher.stats()
            stats.passes = batcher.passes - self._warm_up.passes
            stats.busy_s = batcher.busy_s - self._warm_up.busy_s
        return stats

    def close(self) -> None:
        """Leaves nothing behind in the file system. Call it when the batcher has stopped."""
        if self._lanes is not None:
            self._lanes.close()

    @property
    def _desks(self) -> tuple[CallDesk, ...]:
        return self._desk, self._lane_desk, self._direct_desk

    def _compute_thread_is_done(self) -> bool:
        """Whether it has answered every call that it took itself; it ends their streams at its own end."""
        return (self._lanes is None or not self._lanes.num_in_flight) and (
            self._door is None or self._door.is_idle()
        )

    def _ready(self) -> LoadedModel:
        if self._draining:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_AFTER_S)
        if self._loaded is None:
            raise Unavailable("the worker is loading", retry_after_s=RETRY_AFTER_S)
        return self._loaded


class _CallStream:
    """The calls of one stream: at most `limit` of them are read and not yet written back."""

    def __init__(self, desk: CallDesk, batcher: Batcher, limit: int) -> None:
        self._desk = desk
        self._batcher = batcher
        self._places = asyncio.Semaphore(limit)
        self._in_flight: set[_StreamTicket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        # Bounded by the places; None ends the stream.
        self._responses: asyncio.Queue[Response | None] = asyncio.Queue()

    async def responses(self, requests: AsyncIterator[Request]) -> AsyncGenerator[Response, None]:
        """Answers in the order in which they are ready, until the caller has ended its side and has them all."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._responses.get()) is not None:
                yield response
                self._places.release()
            if reader.done():
                await reader
        finally:
            reader.cancel()
            for ticket in list(self._in_flight):
                self._drop(ticket)

    async def answered(self) -> None:
        """Returns when every call taken so far has its response queued."""
        await self._idle.wait()

    def end(self) -> None:
        """Lets `responses` end after the responses that are queued."""
        self._responses.put_nowait(None)

    def settle(self, ticket: _StreamTicket, result: Computed | MoesaicError) -> None:
        """Answers a call once: what comes second, the result or the end of the caller's time, changes nothing."""
        if ticket in self._in_flight:
            self._forget(ticket)
            self._responses.put_nowait(self._desk.answer(ticket.taken, result))

    def expire(self, ticket: _StreamTicket) -> None:
        """The caller's time is over."""
        self._batcher.withdraw(ticket)
        self.settle(ticket, DeadlineExceeded("the caller's time is over"))

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                await self._places.acquire()
                self._begin(request)
            await self.answered()
        finally:
            self.end()

    def _begin(self, request: Request) -> None:
        taken = self._desk.take(request)
        if not isinstance(taken, OpenCall):
            self._responses.put_nowait(taken)
            return
        ticket = _StreamTicket(self, taken)
        self._in_flight.add(ticket)
        self._idle.clear()
        try:
            self._batcher.offer(ticket)
        except MoesaicError as error:
            self.settle(ticket, error)

    def _drop(self, ticket: _StreamTicket) -> None:
        """Its caller went away."""
        self._forget(ticket)
        self._batcher.withdraw(ticket)
        self._desk.drop(ticket.taken)

    def _forget(self, ticket: _StreamTicket) -> None:
        ticket.wanted = False
        ticket.timer.cancel()
        self._in_flight.discard(ticket)
        if not self._in_flight:
            self._idle.set()


class _StreamTicket:
    """A call of a stream: its answer goes back to the event loop."""

    def __init__(self, stream: _CallStream, taken: OpenCall) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self.taken = taken
        self.caller = id(stream)
        self.wanted = True
        # The caller hears of the end of its time even from a worker that hangs.
        self.timer = self._loop.call_at(taken.call.deadline_s, stream.expire, self)

    @property
    def call(self) -> Call:
        return self.taken.call

    @property
    def queued_s(self) -> float:
        return self.taken.taken_s

    def answer(self, result: Computed | MoesaicError) -> None:
        # The loop may have ended together with whoever waited.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stream.settle, self, result)
