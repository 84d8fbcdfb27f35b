"""A router process: model, engine and service, and the view of the cluster that updates its replica pool.

`start` binds the port (health NOT_SERVING), `load` reads the dense weights, `wait_ready` waits for the first epoch,
starts the engine and passes one real token through every layer. From then on health is SERVING while the engine is
alive and every expert of the current epoch has a replica. Epochs come and go meanwhile (router/control).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import uuid
from functools import partial

from moesaic import rpc
from moesaic.addresses import join_address
from moesaic.epoch import Epoch
from moesaic.errors import Unavailable
from moesaic.routing_table import Replica, Snapshot
from moesaic.v1 import inference_pb2, inference_pb2_grpc
from router.api.control_service import RouterControlService
from router.api.loading_service import LoadingService
from router.api.sampling_defaults import neutral_sampling, read_sampling_defaults
from router.api.service import InferenceService, ModelFacts
from router.api.stats import router_stats
from router.api.text_reader import TextReader
from router.assembly import LoadedRouter, load_router
from router.config import RouterConfig
from router.control.cluster_watch import ClusterView
from router.control.epoch_keeper import EpochKeeper
from router.control.epoch_reports import EpochReporter, RouterIdentity, report_of
from router.control.epochs import EpochBook
from router.engine.engine import Engine
from router.engine.readiness import pass_one_token
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.negotiate import open_transports
from router.workers.worker_link import WorkerLink

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 0.25
DRAIN_POLL_S = 0.02
ENGINE_STOP_S = 5.0
# How long the event loop may hold the interpreter while the engine's thread waits for it. Python's default of
# 5 ms is as long as streaming all tokens of a step takes, and the engine would lose that time in every step.
SWITCH_INTERVAL_S = 0.0005


class RouterServer:
    """One router. The order of calls is start, load, wait_ready, …, stop."""

    def __init__(self, config: RouterConfig, view: ClusterView) -> None:
        self._config = config
        self._view = view
        self._incarnation = uuid.uuid4().hex
        self._address = ""
        self._started_s = time.monotonic()
        self._servicer = LoadingService()
        self._control = RouterControlService()
        self._server = rpc.Server(
            {
                rpc.INFERENCE_SERVICE: lambda server: (
                    inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._servicer, server)
                ),
                rpc.ROUTER_CONTROL_SERVICE: lambda server: (
                    inference_pb2_grpc.add_RouterControlServiceServicer_to_server(self._control, server)
                ),
            }
        )
        self._clock = PhaseClock()
        self._pool = ReplicaPool(connect=self._connect)
        self._newest: Snapshot | None = None
        self._epochs: EpochKeeper | None = None
        self._loaded: LoadedRouter | None = None
        self._sampling_defaults = neutral_sampling()
        self._engine: Engine | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def _connect(self, replica: Replica) -> WorkerLink:
        engine = self._config.engine
        use_shared_memory, use_direct = engine.shared_memory == "auto", engine.direct_stream == "auto"
        opening = partial(open_transports, use_shared_memory=use_shared_memory, use_direct=use_direct)
        return WorkerLink(replica, open_transports=opening if use_shared_memory or use_direct else None)

    async def start(self) -> str:
        """Binds the port and begins to follow the cluster. Returns HOST:PORT."""
        port = await self._server.start(self._config.host, self._config.port)
        self._address = join_address(self._config.host, port)
        self._tasks.append(asyncio.create_task(self._follow()))
        return self._address

    async def load(self) -> None:
        """Reads everything but the experts. Raises CheckpointError, InvalidArgument."""
        if self._config.engine.generation_config == "auto":
            self._sampling_defaults = read_sampling_defaults(self._config.model)
        self._loaded = loaded = await asyncio.to_thread(load_router, self._config, self._pool, self._clock)
        self._engine = loaded.engine()
        book = EpochBook(loaded.gates, loaded.shape.hidden_size)
        self._epochs = EpochKeeper(book, self._engine, self._pool.missing)
        if self._newest is not None:
            self._epochs.take(self._newest)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once a real token has passed through every layer. Raises Unavailable after `timeout_s`."""
        loaded, engine, epochs = self._loaded, self._engine, self._epochs
        assert loaded is not None and engine is not None and epochs is not None, "start and load come first"
        try:
            async with asyncio.timeout(timeout_s):
                epoch = await epochs.wait_first()
                sys.setswitchinterval(SWITCH_INTERVAL_S)
                loaded.heartbeat.start()
                engine.start()
                await pass_one_token(engine, epochs.book.choose("readiness", "", epoch.id, None), timeout_s)
        except TimeoutError as error:
            raise Unavailable(
                f"not every expert had a worker within {timeout_s:.0f} s", reason="NOT_READY"
            ) from error
        self._servicer.service = self._make_service(loaded, engine, epochs.book)
        self._control.reader = TextReader(
            engine,
            loaded.text,
            loaded.model.gates,
            epochs.book.plain_view,
            max_model_len=loaded.max_model_len,
        )
        await self._server.set_serving(True)
        self._tasks.append(asyncio.create_task(self._keep_health_true(engine, epochs)))
        self._tasks.append(asyncio.create_task(self._reporter(engine, epochs).run()))

    async def stop(self, drain_s: float) -> None:
        """Refuses new requests, gives running ones `drain_s` seconds to end, then stops everything."""
        await self._server.set_serving(False)
        if self._servicer.service is not None:
            self._servicer.service.drain()
        deadline_s = time.monotonic() + drain_s
        while self._engine is not None and self._engine.num_open and time.monotonic() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, ENGINE_STOP_S)
        if self._loaded is not None:
            await asyncio.to_thread(self._loaded.heartbeat.stop)
        await self._server.stop(1.0)
        await asyncio.to_thread(self._pool.close)

    async def wait(self) -> None:
        """Waits until the server has stopped."""
        await self._server.wait()

    async def _follow(self) -> None:
        async for snapshot in self._view.watch():
            self._pool.update(snapshot.table)
            self._newest = snapshot
            if self._epochs is not None:
                self._epochs.take(snapshot)

    async def _keep_health_true(self, engine: Engine, epochs: EpochKeeper) -> None:
        """Keeps health NOT_SERVING while the engine is dead or an expert has no replica, else SERVING. Meanwhile epochs come
        and go."""
        serving = True
        known: tuple[Epoch | None, tuple[WorkerLink, ...]] | None = None
        covered = False
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            self._pool.prune()
            epochs.settle()
            epoch, links = epochs.book.current, self._pool.links
            if known is None or known[0] is not epoch or known[1] is not links:
                known, covered = (epoch, links), epoch is not None and not self._pool.missing(epoch)
            healthy = engine.alive and covered
            if healthy != serving:
                serving = healthy
                log.warning("health changed", extra={"fields": {"serving": serving}})
                await self._server.set_serving(serving)

    def _reporter(self, engine: Engine, epochs: EpochKeeper) -> EpochReporter:
        identity = RouterIdentity(self._config.name or self._address, self._incarnation, self._address)
        return EpochReporter(
            lambda: self._view.control_address,
            lambda: report_of(
                identity,
                epochs.book,
                revision=max(0, self._pool.revision),
                open_sequences=engine.open_sequences(),
                tallies=engine.tallies(),
            ),
            epochs.changed,
        )

    def _stats(
        self, loaded: LoadedRouter, engine: Engine, book: EpochBook
    ) -> inference_pb2.GetRouterStatsResponse:
        epoch = book.current
        return router_stats(
            engine.stats(),
            phases=self._clock.snapshot(),
            replicas=self._pool.health(),
            gates=loaded.model.gate_stats.snapshot(),
            experts=0 if epoch is None else len(epoch.versions),
            experts_without_worker=0 if epoch is None else len(self._pool.missing(epoch)),
            uptime_s=time.monotonic() - self._started_s,
        )

    def _make_service(self, loaded: LoadedRouter, engine: Engine, book: EpochBook) -> InferenceService:
        return InferenceService(
            engine,
            loaded.text,
            ModelFacts(
                model=self._config.served_name,
                family=loaded.shape.family,
                max_model_len=loaded.max_model_len,
                vocab_size=loaded.shape.vocab_size,
                num_layers=loaded.shape.num_layers,
                num_experts=max(loaded.shape.num_slots.values(), default=0),
                top_k=max((layer.top_k for layer in loaded.shape.experts.values()), default=0),
                created=int(time.time()),
                encodes_prompts=loaded.encodes_prompts,
                sampling_defaults=self._sampling_defaults,
            ),
            stats=lambda: self._stats(loaded, engine, book),
            epoch=lambda: "" if book.current is None else book.current.id,
            choose_view=book.choose,
            control_address=lambda: self._view.control_address,
            request_timeout_s=self._config.engine.request_timeout_s,
            on_missing=self._config.engine.on_missing,
        )
