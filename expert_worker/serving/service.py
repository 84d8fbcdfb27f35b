"""ExpertService: calls in, answers out. What a call means is the desk's business, computing is the batcher's.

A stream carries many calls at once, bounded; each is answered in-band, with rows or with its own error, and a refused
call never ends the stream. While the worker drains, new calls are refused and every call taken before is answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from expert_worker.compute.batcher import Batcher, BatcherStats
from expert_worker.compute.call import ROW_DTYPES
from expert_worker.experts.store import ExpertStore
from expert_worker.serving.call_handler import RETRY_AFTER_S, CallDesk, Request, Response
from expert_worker.serving.direct_server import DirectDoor
from expert_worker.serving.grpc_stream import CallStream
from expert_worker.serving.shared_memory import Lanes
from moesaic.epoch import versions_to_proto
from moesaic.errors import Unavailable
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
        self._streams: set[CallStream] = set()
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
        stream = CallStream(self._desk, batcher, self._max_stream_calls)
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
            # Read before the experts: what is described is never older than the revision says.
            contents_revision=loaded.store.revision,
            experts=versions_to_proto(loaded.store.experts()),
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
