"""A whole cluster in one event loop of virtual time: a real control plane, and workers and routers that are played.

The plane can be killed at any failpoint. After that nothing of it has an effect any more, and another one is started on the
same state folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.virtual_time import VirtualLoop

from cluster.control.change_order import ChangeOrder
from cluster.control.control_plane import ControlPlane
from cluster.control.controller import Cluster, Member
from cluster.control.process_report import PROCESS_DIED, ProcessReport
from cluster.control.progress import Progress
from cluster.control.rollout_config import RolloutConfig
from cluster.control.worker_calls import ProbeOutcome
from cluster.control.worker_facts import WorkerFacts
from moesaic.bundles import BaseModel, Bundle
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.errors import FailedPrecondition, Unavailable
from moesaic.routing_table import Replica, Snapshot
from moesaic.settings import RolloutSettings
from moesaic.v1 import control_pb2

EXPERT_BYTES = 1000
DRAIN_S = 10.0
HOLD_S = 2.0
# How long what happens to a worker takes to be seen.
NEWS_S = 0.1


class Crash(BaseException):
    """The process of the controller ends here."""


def folder_version(address: ExpertAddress) -> ExpertVersion:
    return ExpertVersion(address, bytes([0xFF, address.layer, address.slot]) + bytes(29))


@dataclass
class PlayedWorker:
    """`home` is what it holds after every start."""

    name: str
    host: str
    home: frozenset[ExpertAddress]
    room: int
    starts: int = 1
    alive: bool = True
    revision: int = 1
    held: set[ExpertVersion] = field(default_factory=set)
    # What it lost with its process and does not hold again.
    lost: set[ExpertVersion] = field(default_factory=set)
    # Set, and replaced by another one, at every change.
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        self.lost |= self.held
        self.alive, self.starts, self.revision = True, self.starts + 1, 0
        self.hold(set(map(folder_version, self.home)))

    def die(self) -> None:
        self.lost |= self.held
        self.alive = False
        self._tell()

    def hold(self, versions: set[ExpertVersion]) -> None:
        self.held = versions
        self.lost -= versions
        self.revision += 1
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def replica(self) -> Replica:
        return Replica(self.name, self.name, f"{self.name}-{self.starts}", frozenset(self.held))


@dataclass
class PlayedRouter:
    """Uses what is published as soon as replicas hold it, and begins and ends sequences."""

    name: str
    starts: int = 1
    told: Snapshot | None = None
    # The ids of the epochs in use; empty without one.
    current: str = ""
    canary: str = ""
    # The epochs of its sequences, and when each epoch left its use.
    pinned: list[str] = field(default_factory=list)
    left_s: dict[str, float] = field(default_factory=dict)
    known: dict[str, Epoch] = field(default_factory=dict)

    def take(self, told: Snapshot, lost: Set[ExpertVersion], now_s: float) -> None:
        """`lost`: the versions whose workers have died, the only ones that a published epoch may lack."""
        before, self.told = self.in_use, told
        self.current = self._adopt(told.epoch, lost) or self.current
        self.canary = self._adopt(told.canary and told.canary.epoch, lost)
        for epoch_id in before - self.in_use:
            self.left_s[epoch_id] = now_s
        for epoch_id in self.in_use:
            self.left_s.pop(epoch_id, None)

    def _adopt(self, epoch: Epoch | None, lost: Set[ExpertVersion]) -> str:
        """The id of the epoch, if it is in use already or can be."""
        if epoch is None or epoch.id in self.in_use:
            return "" if epoch is None else epoch.id
        assert self.told is not None
        held = frozenset[ExpertVersion]().union(*(replica.holdings for replica in self.told.table.replicas))
        lacking = epoch.expert_versions - held
        assert lacking <= lost, f"{self.name} got epoch {epoch.id}, which nobody has held"
        if lacking:
            return ""
        self.known[epoch.id] = epoch
        return epoch.id

    @property
    def in_use(self) -> set[str]:
        return {epoch for epoch in (self.current, self.canary) if epoch}

    def retire_overstayers(self, now_s: float) -> None:
        self.pinned = [epoch for epoch in self.pinned if now_s - self.left_s.get(epoch, now_s) < DRAIN_S]

    def needed(self) -> frozenset[ExpertVersion]:
        epochs = self.in_use | set(self.pinned)
        return frozenset[ExpertVersion]().union(*(self.known[epoch].expert_versions for epoch in epochs))

    def report(self) -> control_pb2.ReportEpochsRequest:
        told = self.told
        return control_pb2.ReportEpochsRequest(
            router=self.name,
            incarnation=str(self.starts),
            address="127.0.0.1:1",
            epoch=self.current,
            canary=self.canary,
            routing_table_revision=told.table.revision if told else 0,
            epochs=[
                control_pb2.EpochStats(epoch=epoch, open_sequences=self.pinned.count(epoch))
                for epoch in sorted(set(self.pinned))
            ],
        )


class World:
    """Workers, routers, and the control plane that runs now."""

    def __init__(
        self,
        state: Path,
        base: BaseModel,
        workers: Sequence[PlayedWorker],
        num_routers: int = 2,
        *,
        replicas: int = 2,
    ) -> None:
        self.loop = VirtualLoop()
        self.config = RolloutConfig(
            base, state, is_lasting=True, replicas=replicas, settings=RolloutSettings(drain_s=DRAIN_S)
        )
        self.workers = {worker.name: worker for worker in workers}
        for worker in workers:
            worker.held = set(map(folder_version, worker.home))
        self.routers = [PlayedRouter(f"router-{index}") for index in range(num_routers)]
        # The failpoint at which the plane is killed.
        self.armed: str | None = None
        self.dead = False
        self.num_planes = 0
        self.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        asyncio.set_event_loop(self.loop)
        return self.loop.run_until_complete(work)

    def start(self) -> None:
        """Another control plane on the same state."""
        self.dead, self.armed = False, None
        self.num_planes += 1
        members = tuple(
            Member(worker.name, control_pb2.PROCESS_ROLE_EXPERT_WORKER, worker.home)
            for worker in self.workers.values()
        )
        cluster = Cluster(
            "tiny", frozenset(self.config.base.model.addresses), members, self.config.base.fingerprint
        )
        self.plane = ControlPlane(
            cluster,
            self.config,
            self,
            calls=self,
            first_revision=self.num_planes << 32,
            failpoints=self.pass_failpoint,
            clock=self.loop.time,
        )
        self.tasks = [self.loop.create_task(self._run_plane(self.plane))]
        self.tasks += [self.loop.create_task(self._run_router(router)) for router in self.routers]

    def stop(self) -> None:
        """The plane's process is gone, as after a kill."""
        self.dead = True
        self.run(self._end())
        self.plane.close()

    def close(self) -> None:
        self.stop()
        self.loop.close()

    async def _end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.plane.changes.stop()

    def pass_time(self, seconds: float) -> None:
        """Restarts the plane if it was killed meanwhile."""
        self.run(asyncio.sleep(seconds))
        if self.dead:
            self.stop()
            self.start()

    def begin(self, order: ChangeOrder) -> Progress:
        async def call() -> Progress:
            return self.plane.changes.begin(order)

        progress: Progress = self.run(call())
        return progress

    def change(self, order: ChangeOrder) -> None:
        """A whole change up to its commit. Raises what refused it."""

        async def call() -> None:
            async for step in self.plane.changes.begin(order).follow():
                if step.stage == control_pb2.CHANGE_STAGE_COMMIT:
                    return

        self.run(call())

    def upload(self, bundle: Bundle) -> None:
        upload = self.plane.bundles.upload()
        try:
            upload.write_manifest(bundle.manifest_bytes)
            upload.write_weights(bundle.weights_file.read_bytes())
            upload.finish()
        finally:
            if not self.dead:  # a process that is gone cleans nothing up
                upload.close()

    def forget(self, bundle: Bundle) -> None:
        """Raises what refused it."""
        self.run(self.plane.forgetting.forget(bundle.digest, "ann"))

    def pass_failpoint(self, step: str) -> None:
        if self.dead or step == self.armed:
            self.dead = True
            raise Crash(step)

    async def _run_plane(self, plane: ControlPlane) -> None:
        try:
            await plane.run()
        except* Crash:
            self.dead = True

    async def _run_router(self, router: PlayedRouter) -> None:
        plane = self.plane
        await asyncio.sleep(0.1)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(router, plane))
            group.create_task(self._report(router, plane))

    async def _follow(self, router: PlayedRouter, plane: ControlPlane) -> None:
        async for told in plane.controller.watch():
            if self.dead:
                return
            lost = set[ExpertVersion]().union(*(worker.lost for worker in self.workers.values()))
            router.take(told, lost, self.loop.time())
            plane.hear(router.report())

    async def _report(self, router: PlayedRouter, plane: ControlPlane) -> None:
        while not self.dead:
            router.retire_overstayers(self.loop.time())
            plane.hear(router.report())
            await asyncio.sleep(1.0)

    # The observer of the plane.

    async def report(self, name: str, seen: int) -> ProcessReport:
        until_s = self.loop.time() + HOLD_S
        worker = self.workers[name]
        while True:
            if not worker.alive:
                raise Unavailable("it died", reason=PROCESS_DIED)
            revision = worker.starts * 100_000 + worker.revision
            if revision != seen or self.loop.time() >= until_s:
                return ProcessReport(
                    name, revision, control_pb2.PROCESS_STATE_READY, name, worker.host, 1, worker.starts
                )
            await self._await_change(worker, until_s)

    async def _await_change(self, worker: PlayedWorker, until_s: float) -> None:
        """News take a while; whoever asks at short intervals instead costs the test most of its time."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                await worker.changed.wait()
                await asyncio.sleep(NEWS_S)

    async def describe(self, address: str) -> WorkerFacts:
        worker = self._alive(address)
        size = len(worker.held) * EXPERT_BYTES
        return WorkerFacts(worker.replica, size, (worker.room - len(worker.held)) * EXPERT_BYTES)

    # The calls of the plane.

    async def load(
        self, address: str, bundle: bytes, versions: Sequence[ExpertVersion]
    ) -> AsyncIterator[ExpertVersion]:
        worker = self._alive(address)
        starts = worker.starts
        await asyncio.sleep(0.2)
        self._check_not_dead()
        if not worker.alive or worker.starts != starts:
            raise Unavailable("it died")
        if len(worker.held | set(versions)) > worker.room:
            raise FailedPrecondition("it does not fit", reason="OUT_OF_MEMORY")
        for version in versions:
            yield version
        if bundle:
            self.plane.bundles.folder(bundle)
        else:
            assert set(versions) <= set(map(folder_version, worker.home)), "not in its model folder"
        worker.hold(worker.held | set(versions))

    async def unload(self, address: str, versions: Sequence[ExpertVersion]) -> None:
        self._check_not_dead()
        worker = self._alive(address)
        for version in set(versions) & worker.held:
            elsewhere = any(
                version in other.held
                for other in self.workers.values()
                if other is not worker and other.alive
            )
            for router in self.routers:
                assert elsewhere or version not in router.needed(), f"{router.name} needs {version}"
        worker.hold(worker.held - set(versions))

    async def probe(
        self, address: str, bundle: bytes, versions: Sequence[ExpertVersion]
    ) -> Sequence[ProbeOutcome]:
        await asyncio.sleep(0.05)
        self._check_not_dead()
        worker = self._alive(address)
        if not set(versions) <= worker.held:
            raise FailedPrecondition("it does not hold that")
        return [ProbeOutcome(version, True, 0.0, 1.0) for version in versions]

    def _alive(self, address: str) -> PlayedWorker:
        worker = self.workers[address]
        if not worker.alive:
            raise Unavailable("it died", reason=PROCESS_DIED)
        return worker

    def _check_not_dead(self) -> None:
        if self.dead:
            raise Crash("dead")
