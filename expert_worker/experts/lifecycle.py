"""Loads versions beside those that are held, and gives them up, while the worker computes.

One thread of low priority loads, one request at a time; it reads in small pieces and releases the interpreter's lock
in each, so that the compute thread goes on. Memory is accounted for before anything is read. A request is held as a
whole from one moment on, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from expert_worker.experts import allocator
from expert_worker.experts.expert import Expert
from expert_worker.experts.expert_reader import Scratch
from expert_worker.experts.load_plan import LoadJob, count_modules, needed_bytes, plan_load
from expert_worker.experts.loader import ExpertLoader
from expert_worker.experts.stack import ExpertStacks, Place
from expert_worker.experts.store import ExpertStore
from moesaic.bundles import Bundle
from moesaic.epoch import ExpertVersion
from moesaic.errors import FailedPrecondition, Overloaded, Unavailable

log = logging.getLogger(__name__)

# How many requests may wait while another one loads.
MAX_WAITING = 8
RETRY_AFTER_S = 1.0
# How long an unloaded expert may still be computed before the answer to the request goes out all the same.
GONE_TIMEOUT_S = 5.0
OUT_OF_MEMORY = "OUT_OF_MEMORY"

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A version that is ready, and the bytes read for the request so far and in all."""

    version: ExpertVersion
    loaded_bytes: int
    total_bytes: int


class ExpertLifecycle:
    """Changes what a serving worker holds. All methods are called on one event loop."""

    def __init__(
        self,
        loader: ExpertLoader,
        store: ExpertStore,
        stacks: ExpertStacks,
        thread: ThreadPoolExecutor,
        available_bytes: Callable[[], int],
    ) -> None:
        """`thread` loads, and is shut down by `close`."""
        self._loader = loader
        self._store = store
        self._stacks = stacks
        self._thread = thread
        self._available_bytes = available_bytes
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._stopping = threading.Event()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until no other request loads. Raises Overloaded when too many wait, Unavailable after `close`."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} requests to load wait already", retry_after_s=RETRY_AFTER_S)
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            self._check_open()
            yield
        finally:
            self._turn.release()

    async def load(
        self, versions: Sequence[ExpertVersion], bundle: Bundle | None
    ) -> AsyncGenerator[LoadProgress, None]:
        """Loads what is not held yet, within a `turn`; without a bundle from the model's folder.

        Raises InvalidArgument or FailedPrecondition for a bundle that is wrong or does not fit, CheckpointError or
        DataLoss for weights that are wrong, Unavailable when the worker stops. Nothing is held then, nor when the
        iterator is closed early.
        """
        held = [version for version in versions if self._store.holds(version)]
        wanted = [version for version in dict.fromkeys(versions) if version not in set(held)]
        # A loader of its own keeps the memory that weights pass through no longer than this request.
        loader = replace(self._loader, scratch=Scratch())
        jobs = await self._run(lambda _: plan_load(wanted, bundle, loader))
        self._check_memory(jobs)
        total, loaded = sum(job.stored_bytes for job in jobs), 0
        for version in held:
            yield LoadProgress(version, loaded, total)
        if not jobs:
            return
        ready: dict[ExpertVersion, Expert] = {}
        try:
            places = await self._run(lambda _: self._place(jobs))
            for job in jobs:
                ready[job.version] = await self._build(job, places.pop(0))
                loaded += job.stored_bytes
                yield LoadProgress(job.version, loaded, total)
            self._check_open()
            self._store.add_all(ready, beside=held)
        finally:
            ready.clear()
            self._tidy_up()
        log.info("experts loaded", extra={"fields": {"experts": len(jobs), "bytes": loaded}})

    async def unload(self, versions: Iterable[ExpertVersion]) -> None:
        """Gives versions up; those that are not held are no error. Returns when their memory has returned, or when
        calls that began with them take too long."""
        versions = list(versions)
        gone = _Gone(self._store.remove_all(versions))
        if gone.count:
            held = {version.digest for version in self._store.experts()}
            self._loader.forget({version.digest for version in versions} - held)
            await gone.wait(GONE_TIMEOUT_S)
            self._tidy_up()
            await self._run(lambda _: None)
            log.info("experts unloaded", extra={"fields": {"experts": gone.count}})

    def close(self) -> None:
        """Ends what loads, and refuses what would load."""
        self._stopping.set()
        self._thread.shutdown(wait=False)

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise Unavailable("the worker is stopping")

    def _check_memory(self, jobs: Sequence[LoadJob]) -> None:
        """Raises FailedPrecondition with the number of bytes that are missing."""
        needed, available = needed_bytes(jobs, self._stacks), self._available_bytes()
        if needed > available:
            raise _out_of_memory(
                f"{len(jobs)} experts need {needed} bytes, {available} are free: {needed - available} are missing"
            )

    def _place(self, jobs: Sequence[LoadJob]) -> list[Place]:
        """A place for each job. Called on the loading thread, as all that touches the stacks."""
        try:
            for (layer, module), count in count_modules(jobs).items():
                self._stacks.reserve(layer, module, count)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory("the device has no memory left for a stack") from error
        return [self._stacks.place(job.version.address.layer, job.module) for job in jobs]

    async def _build(self, job: LoadJob, place: Place) -> Expert:
        try:
            return await self._run(lambda stopping: job.build(place, stopping))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(
                "the memory is full, though the bytes were there when the load began"
            ) from error

    async def _run(self, work: Callable[[threading.Event], Result]) -> Result:
        """Work on the loading thread. When the caller goes, the event is set, and the work's end awaited."""
        self._check_open()
        abandoned = _EitherEvent(self._stopping)
        future = asyncio.get_running_loop().run_in_executor(self._thread, work, abandoned)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            abandoned.set()
            with contextlib.suppress(Exception):
                await future
            raise

    def _tidy_up(self) -> None:
        """Returns what is not used any more, on the loading thread."""

        def tidy_up() -> None:
            self._stacks.drop_empty()
            allocator.trim()

        with contextlib.suppress(RuntimeError):  # the thread ends together with the worker
            self._thread.submit(tidy_up)


class _EitherEvent(threading.Event):
    """Set when it is set itself, or another event is."""

    def __init__(self, other: threading.Event) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or self._other.is_set()


class _Gone:
    """Waits until nothing refers to some experts any more."""

    def __init__(self, experts: list[Expert]) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.count = len(experts)
        self._left = [weakref.ref(expert, self._notify) for expert in experts]

    async def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(reference() is not None for reference in self._left):
                    self._changed.clear()
                    await self._changed.wait()

    def _notify(self, _: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._changed.set)


def _out_of_memory(problem: str) -> FailedPrecondition:
    return FailedPrecondition(f"experts: {problem}", field="experts", reason=OUT_OF_MEMORY)
