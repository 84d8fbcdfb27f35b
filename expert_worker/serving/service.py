"""ExpertService: the RPCs of a worker. The call handler validates calls, the batcher computes them.

A stream carries a bounded number of calls at once; each is answered in-band, with rows or with its own error,
and a refused call never ends the stream. While the worker drains, new calls are refused and earlier ones are
answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from expert_worker.compute.batcher import Batcher, BatcherStats
from expert_worker.compute.call import ROW_DTYPES
from expert_worker.experts.store import ExpertStore
from expert_worker.serving.call_handler import RETRY_AFTER_S, CallHandler, Request, Response
from expert_worker.serving.direct_server import DirectServer
from expert_worker.serving.grpc_stream import CallStream
from expert_worker.serving.shared_memory import SharedMemoryServer
from moesaic import rpc
from moesaic.epoch import versions_to_proto
from moesaic.errors import Unavailable
from moesaic.families import MoeModel
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from moesaic.wire import messages as wire

log = logging.getLogger(__name__)

DRAIN_PERIOD_S = 0.005


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the service serves once the weights are loaded."""

    name: str
    model: MoeModel
    device: str
    store: ExpertStore
    batcher: Batcher
    # The memory that further experts may take.
    available_bytes: Callable[[], int]


class ExpertService(expert_pb2_grpc.ExpertServiceServicer):
    """The servicer of one worker. It answers Unavailable before `serve` and after `drain`.

    `shared_memory` also opens that transport, `direct_host` also a direct port at that address."""

    def __init__(
        self,
        *,
        worker: str,
        incarnation: str,
        max_call_rows: int,
        max_stream_calls: int,
        shared_memory: bool,
        direct_host: str | None,
    ) -> None:
        self._worker = worker
        self._incarnation = incarnation
        self._max_stream_calls = max_stream_calls
        self._handler = CallHandler(worker=worker, max_call_rows=max_call_rows)
        self._shared_memory_handler = CallHandler(worker=worker, max_call_rows=max_call_rows)
        self._shared_memory = (
            SharedMemoryServer(self._shared_memory_handler, incarnation=incarnation)
            if shared_memory
            else None
        )
        self._direct_handler = CallHandler(worker=worker, max_call_rows=max_call_rows)
        self._direct_server = (
            None if direct_host is None else DirectServer(self._direct_handler, host=direct_host)
        )
        self._loaded: LoadedModel | None = None
        self._warm_up = BatcherStats()
        self._streams: set[CallStream] = set()
        self._draining = False
        self._start_s = time.monotonic()

    def rename(self, worker: str) -> None:
        """Gives the worker a name that follows from its port. To be called before `serve`."""
        self._worker = worker
        for handler in self._handlers:
            handler.worker = worker

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods. Compute has its own serialisers, which pass tensors as views."""
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(self, server)
        compute = grpc.stream_stream_rpc_method_handler(
            self.Compute,
            request_deserializer=wire.decode_request,
            response_serializer=wire.encode_response,
        )
        server.add_registered_method_handlers(rpc.EXPERT_SERVICE, {"Compute": compute})

    def serve(self, loaded: LoadedModel) -> None:
        """Starts to answer calls. The batcher's work until now was warm-up and is not counted."""
        self._loaded = loaded
        self._warm_up = loaded.batcher.stats()
        for handler in self._handlers:
            handler.open(loaded.model, loaded.store)
        if self._shared_memory is not None:
            self._shared_memory.open(loaded.batcher)
        if self._direct_server is not None:
            self._direct_server.open(loaded.batcher)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new calls, answers earlier ones, then ends all streams. False when the time ran out."""
        self._draining = True
        for handler in self._handlers:
            handler.close()
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
        stream = CallStream(self._handler, batcher, self._max_stream_calls)
        self._streams.add(stream)
        try:
            async with aclosing(stream.responses(requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._streams.discard(stream)
        if self._draining:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_AFTER_S)

    async def OpenTransports(
        self, request: expert_pb2.OpenTransportsRequest, context: Any
    ) -> expert_pb2.OpenTransportsResponse:
        self._ready()
        path = (
            ""
            if self._shared_memory is None
            else self._shared_memory.path_for(request.host_id, request.shared_memory_version)
        )
        port = 0 if self._direct_server is None else self._direct_server.port
        return expert_pb2.OpenTransportsResponse(
            socket_path=path, incarnation=self._incarnation, direct_port=port
        )

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
            available_bytes=loaded.available_bytes(),
        )

    async def GetWorkerStats(
        self, request: expert_pb2.GetWorkerStatsRequest, context: Any
    ) -> expert_pb2.GetWorkerStatsResponse:
        handlers = self._handlers
        stats = expert_pb2.GetWorkerStatsResponse(
            calls=sum(handler.calls for handler in handlers),
            rows=sum(handler.rows for handler in handlers),
            refused_calls=sum(handler.refused_calls for handler in handlers),
            shared_memory_calls=self._shared_memory_handler.calls,
            direct_calls=self._direct_handler.calls,
            uptime_s=time.monotonic() - self._start_s,
            resident_bytes=psutil.Process().memory_info().rss,
        )
        if self._loaded is not None:
            batcher = self._loaded.batcher.stats()
            stats.passes = batcher.passes - self._warm_up.passes
            stats.busy_s = batcher.busy_s - self._warm_up.busy_s
        return stats

    def close(self) -> None:
        """Removes the files of the shared-memory transport. Call it when the batcher has stopped."""
        if self._shared_memory is not None:
            self._shared_memory.close()

    @property
    def _handlers(self) -> tuple[CallHandler, ...]:
        return self._handler, self._shared_memory_handler, self._direct_handler

    def _compute_thread_is_done(self) -> bool:
        """Whether it has answered every call that it accepted itself; it ends their streams when it stops."""
        return (self._shared_memory is None or not self._shared_memory.num_in_flight) and (
            self._direct_server is None or self._direct_server.is_idle()
        )

    def _ready(self) -> LoadedModel:
        if self._draining:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_AFTER_S)
        if self._loaded is None:
            raise Unavailable("the worker is loading", retry_after_s=RETRY_AFTER_S)
        return self._loaded
