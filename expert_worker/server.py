"""The worker as a whole: bind, load, warm up, serve, drain. It runs by hand and inside a Ray actor alike.

The port is bound before the weights are read, so that the loading can be watched. Health is SERVING only
while the compute thread really computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from expert_worker.compute.batcher import Batcher, ComputeCalls
from expert_worker.compute.call import ExpertCall
from expert_worker.compute.compute_pass import compute_calls
from expert_worker.config import WorkerConfig
from expert_worker.experts import allocator
from expert_worker.experts.bundle_source import BundleSource
from expert_worker.experts.expert import Expert, ExpertForm, MlpExpert, choose_form
from expert_worker.experts.free_memory import free_memory
from expert_worker.experts.kept.experts import KeptExperts
from expert_worker.experts.kept.model_file import KeptModel, write_model
from expert_worker.experts.kept.opened_model import open_model
from expert_worker.experts.kept.place import open_kept_folder
from expert_worker.experts.lifecycle import ExpertLifecycle
from expert_worker.experts.load_threads import start_load_threads
from expert_worker.experts.loader import ExpertLoader, load_experts
from expert_worker.experts.stack import ExpertStacks
from expert_worker.experts.store import ExpertStore
from expert_worker.experts.stored_weight import stored_bytes
from expert_worker.serving.control_service import Controlled, WorkerControlService
from expert_worker.serving.service import ExpertService, LoadedModel
from moesaic import rpc
from moesaic.addresses import join_address
from moesaic.compute.device import choose_device, choose_dtype
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import FailedPrecondition, InvalidArgument, Unavailable
from moesaic.families import MoeModel, describe_model
from moesaic.kept_folder import KeptFolder

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 0.5
TEND_PERIOD_S = 60.0
WARM_UP_TIMEOUT_S = 60.0
# Enough for one stream per router, and for clients that watch health or ask for statistics.
MAX_CONCURRENT_RPCS = 256
# After the drain only the end of each stream is left to send.
FINAL_FLUSH_S = 1.0


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the weights were read with, where they are held, and the thread that will load others beside them."""

    loader: ExpertLoader
    stacks: ExpertStacks
    store: ExpertStore
    thread: ThreadPoolExecutor
    # Whether an earlier worker has left all of the experts.
    found: bool

    def to_warm_up(self) -> Mapping[ExpertVersion, Expert]:
        """What is computed before the worker serves. Of experts that were found one of each shape will do, for the
        kernels' own sake: to touch the others would take as long as their number."""
        experts = self.store.experts()
        if not self.found:
            return experts
        of_shape = {
            expert.module: (version, expert)
            for version, expert in experts.items()
            if isinstance(expert, MlpExpert)
        }
        return dict(of_shape.values())


class WorkerServer:
    """One expert worker. Call `start`, then `load`, then `wait`; `stop` may be called at any time."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        on_contents_change: Callable[[], object] = lambda: None,
        compute: ComputeCalls = compute_calls,
    ) -> None:
        """`on_contents_change` is called after every change of `contents_revision`, from any thread.

        `compute` is what the compute thread does with calls.
        """
        self.incarnation = uuid.uuid4().hex
        self.loaded_bytes = 0
        self.total_bytes = 0
        self._config = config
        self._on_contents_change = on_contents_change
        self._served: ExpertStore | None = None
        settings = config.settings
        self._service = ExpertService(
            worker=config.name,
            incarnation=self.incarnation,
            max_call_rows=settings.max_call_rows,
            # Twice the queue, so that a caller with too many calls is refused before its stream is slowed
            # down.
            max_stream_calls=2 * settings.max_queued_calls,
            shared_memory=settings.shared_memory == "auto",
            direct_host=config.host if settings.direct_stream == "auto" else None,
        )
        self._control = WorkerControlService(BundleSource())
        self._server = rpc.Server(
            {
                rpc.EXPERT_SERVICE: self._service.add_to,
                rpc.WORKER_CONTROL_SERVICE: self._control.add_to,
            },
            max_message_bytes=rpc.DATA_MESSAGE_BYTES,
            max_concurrent_rpcs=MAX_CONCURRENT_RPCS,
        )
        self._batcher = Batcher(
            compute,
            max_queued_calls=settings.max_queued_calls,
            max_pass_rows=settings.max_call_rows,
        )
        self._stopping = threading.Event()
        self._health: asyncio.Task[None] | None = None
        self._kept: KeptFolder | None = None
        self._tending: asyncio.Task[None] | None = None

    @property
    def contents_revision(self) -> int:
        """Grows with every expert that is added or removed while the worker serves; 0 before."""
        return 0 if self._served is None else self._served.revision

    async def start(self) -> str:
        """Binds; returns HOST:PORT. Health is NOT_SERVING until `load` has returned."""
        port = await self._server.start(self._config.host, self._config.port)
        if not self._config.name:
            self._service.rename(f"{socket.gethostname()}:{port}")
        self._batcher.start()
        return join_address(self._config.host, port)

    async def load(self) -> None:
        """Reads the weights in a thread, computes a first pass of every layer, and starts to serve.

        Raises CheckpointError, InvalidArgument with field `experts` or `device`, FailedPrecondition when the
        device has too little memory, Unavailable when `stop` was called first.
        """
        loaded = await asyncio.to_thread(self._load)
        try:
            await self._warm_up(loaded)
        except BaseException:
            loaded.thread.shutdown(wait=False)
            raise
        self._serve(loaded)
        self._health = asyncio.create_task(self._watch_health())
        if self._kept is not None:
            self._tending = asyncio.create_task(_tend(self._kept))
        await self._server.set_serving(True)

    async def stop(self, drain_s: float) -> None:
        """Refuses new calls, lets running ones finish within `drain_s` seconds, then ends everything."""
        self._stopping.set()
        self._control.close()
        for task in (self._health, self._tending):
            if task is not None:
                task.cancel()
        await self._server.set_serving(False)
        drained = await self._service.drain(drain_s)
        stopped = await self._batcher.stop(FINAL_FLUSH_S)
        self._service.close()
        await self._server.stop(FINAL_FLUSH_S)
        if (kept := self._kept) is not None:
            self._kept = None
            await asyncio.to_thread(kept.close)
        if not (drained and stopped):
            log.warning("calls were cut off", extra={"fields": {"drain_s": drain_s}})

    async def wait(self) -> None:
        """Returns after `stop`."""
        await self._server.wait()

    async def _warm_up(self, loaded: _Loaded) -> None:
        for call in _warm_up_calls(loaded.to_warm_up(), loaded.loader.model.hidden_size):
            await self._batcher.submit(call)
        if self._stopping.is_set():
            raise Unavailable("stopped while loading")

    def _serve(self, loaded: _Loaded) -> None:
        loader, store = loaded.loader, loaded.store
        device = loader.form.device
        available = partial(free_memory, device)
        self._service.serve(
            LoadedModel(self._config.model.name, loader.model, str(device), store, self._batcher, available)
        )
        lifecycle = ExpertLifecycle(loader, store, loaded.stacks, loaded.thread, available)
        self._control.open(Controlled(lifecycle, store, self._batcher, loader.model, loader.form))
        self._served = store

    def _load(self) -> _Loaded:
        config = self._config
        if config.settings.threads is not None:
            torch.set_num_threads(config.settings.threads)
        device = choose_device(config.device)
        self._kept = open_kept_folder(config.settings, device)
        opened = open_model(config, self._kept)
        checkpoint, model = opened.checkpoint, describe_model(opened.checkpoint, config.dense_layers)
        _check_experts(config.experts, model)
        form = self._choose_form(device, model)
        kept = None if self._kept is None else KeptExperts(self._kept, form, opened.versions)
        loader = ExpertLoader(checkpoint, model, form, kept)
        stacks = ExpertStacks(loader.form, config.settings.spare_experts)
        self.total_bytes = sum(
            stored_bytes(checkpoint, model.experts[address.layer], address) for address in config.experts
        )
        start_s = time.monotonic()
        allocator.return_freed_memory()
        try:
            store = self._load_store(loader, stacks)
        except torch.OutOfMemoryError as error:
            raise FailedPrecondition(
                f"experts: {self.total_bytes} bytes do not fit into the device's free memory",
                field="experts",
                reason="OUT_OF_MEMORY",
            ) from error
        finally:
            allocator.keep_freed_memory()
        found = 0 if kept is None else kept.found
        if self._kept is not None and found < len(config.experts):
            versions = {version.address: version.digest for version in store.experts()}
            write_model(self._kept, opened.fingerprint, KeptModel(checkpoint, versions))
        log.info(
            "experts loaded",
            extra={
                "fields": {
                    "experts": len(config.experts),
                    "bytes": self.loaded_bytes,
                    "held_bytes": store.weight_bytes,
                    "found": found,
                    "seconds": round(time.monotonic() - start_s, 3),
                    "device": str(device),
                }
            },
        )
        thread = start_load_threads(1, low_priority=True)
        return _Loaded(loader, stacks, store, thread, found == len(config.experts))

    def _choose_form(self, device: torch.device, model: MoeModel) -> ExpertForm:
        settings = self._config.settings
        return choose_form(
            settings.expert_dtype,
            device,
            choose_dtype(self._config.dtype, device, model.dtype),
            (model.experts[layer].module for layer in {address.layer for address in self._config.experts}),
            batch_invariant=settings.batch_invariant,
        )

    def _load_store(self, loader: ExpertLoader, stacks: ExpertStacks) -> ExpertStore:
        store = ExpertStore(self._on_contents_change)
        loading = load_experts(
            loader.checkpoint,
            loader.model,
            self._config.experts,
            loader.form,
            stacks=stacks,
            kept=loader.kept,
            stopping=self._stopping,
        )
        for address, held in loading:
            if self._stopping.is_set():
                raise Unavailable("stopped while loading")
            store.add(address, held)
            self.loaded_bytes += stored_bytes(loader.checkpoint, loader.model.experts[address.layer], address)
        return store

    async def _watch_health(self) -> None:
        serving = True
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(HEALTH_PERIOD_S)
                if (healthy := self._batcher.is_healthy()) != serving:
                    serving = healthy
                    log.error("health of the compute thread changed", extra={"fields": {"healthy": healthy}})
                    await self._server.set_serving(healthy)


def _check_experts(experts: frozenset[ExpertAddress], model: MoeModel) -> None:
    if not experts:
        raise InvalidArgument("experts: the worker was given none", field="experts")
    if unknown := sorted(experts.difference(model.addresses)):
        layer, slot = unknown[0]
        raise InvalidArgument(f"experts: the model has no slot {slot} in layer {layer}", field="experts")


async def _tend(kept: KeptFolder) -> None:
    while True:
        await asyncio.to_thread(kept.tend)
        await asyncio.sleep(TEND_PERIOD_S)


def _warm_up_calls(held: Mapping[ExpertVersion, Expert], hidden_size: int) -> Sequence[ExpertCall]:
    """One call per layer, which sends a row of zeros to every one of these experts."""
    hidden = torch.zeros(1, hidden_size)
    by_layer: dict[int, list[Expert]] = {}
    for version, expert in held.items():
        by_layer.setdefault(version.address.layer, []).append(expert)
    return [
        ExpertCall(
            layer=layer,
            hidden=hidden,
            experts=experts,
            counts=[1] * len(experts),
            rows=torch.zeros(len(experts), dtype=torch.int64),
            weights=None,
            deadline_s=time.monotonic() + WARM_UP_TIMEOUT_S,
        )
        for layer, experts in by_layer.items()
    ]
