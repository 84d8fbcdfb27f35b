"""The loop that brings workers to what the epochs in use need, and a candidate to its commit.

It is level-triggered: it looks, asks `plan` for the next actions, carries them out, and looks again. What fails is tried
again after a while, unless it was for the candidate and waiting would not help: that refuses the change.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.control.bundle_store import BundleStore
from cluster.control.controller import Controller
from cluster.control.epoch_store import go_on
from cluster.control.epochs_in_use import EpochsInUse
from cluster.control.pulse import Pulse
from cluster.control.rollout import (
    MODEL_FOLDER,
    Action,
    Commit,
    Desired,
    Footprint,
    Load,
    Observed,
    Probe,
    Publish,
    Unload,
    Worker,
    check_room,
    plan,
)
from cluster.control.router_reports import LATELY_S, RouterReports
from cluster.control.worker_calls import WorkerCalls
from cluster.control.worker_facts import WorkerFacts, WorkerSighting
from moesaic.bundles import BaseModel, Manifest
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.errors import DeadlineExceeded, FailedPrecondition, MoesaicError, Unavailable
from moesaic.v1 import control_pb2

log = logging.getLogger(__name__)

# How often it looks while something depends on time.
TICK_S = 0.2
# How long a worker is left alone after something failed there.
REST_S = 2.0
# How long routers may take to tell which epochs they hold, before a new controller takes anything away.
SETTLE_S = 5.0
_POLL_S = 0.02
# The steps at which tests let it crash.
FAILPOINTS = (
    "rollout.load",
    "rollout.loaded",
    "rollout.probed",
    "rollout.publish",
    "rollout.commit",
    "rollout.committed",
    "rollout.unload",
    "rollout.unloaded",
)


class ShowStage(Protocol):
    """Told how far a change is."""

    def __call__(
        self, stage: control_pb2.ChangeStage, detail: str, done: int = 0, total: int = 0
    ) -> None: ...


@dataclass
class _Passage:
    """The way of a candidate to its commit."""

    epoch: Epoch
    commit: Callable[[], None]
    show: ShowStage
    ended: asyncio.Future[None]
    loaded: set[tuple[str, ExpertVersion]] = field(default_factory=set)
    is_published: bool = False


class Reconciler:
    """`run` is its loop."""

    def __init__(
        self,
        controller: Controller,
        epochs: EpochsInUse,
        bundles: BundleStore,
        reports: RouterReports,
        calls: WorkerCalls,
        base: BaseModel,
        *,
        replicas: int,
        load_timeout_s: float,
        settle_s: float = SETTLE_S,
        failpoints: Callable[[str], None] = go_on,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._controller = controller
        self._epochs = epochs
        self._bundles = bundles
        self._reports = reports
        self._calls = calls
        self._base = base
        self._replicas = replicas
        self._load_timeout_s = load_timeout_s
        self._failpoints = failpoints
        self._clock = clock
        self._settled_at_s = clock() + settle_s
        self._resting: dict[str, float] = {}
        self._passage: _Passage | None = None
        self._idle = Pulse()
        # What is given up beside the rounds, each with its worker; no call of a worker comes between another's steps.
        self._leaving: set[tuple[str, ExpertVersion]] = set()
        self._in_turn: dict[str, asyncio.Lock] = {}
        self._base_footprints = {
            layer: Footprint(experts.module.num_parameters) for layer, experts in base.model.experts.items()
        }
        self._base_slots = frozenset(
            ExpertAddress(layer, slot)
            for layer, experts in base.model.experts.items()
            for slot in range(experts.num_slots)
        )

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as beside:
            await self._go_around(beside)

    async def _go_around(self, beside: asyncio.TaskGroup) -> None:
        last: tuple[Action, ...] = ()
        while True:
            if self._epochs.release(self._reports, self._clock()):
                self._controller.publish()
            actions = self._plan()
            await self._carry_out(actions, beside)
            if actions and actions != last:
                last = actions
                continue
            last = actions
            if not actions and not self._leaving:
                self._idle.beat()
            await self._controller.changed.wait(TICK_S if self._depends_on_time(actions) else None)

    @property
    def is_settled(self) -> bool:
        """Whether routers had the time to tell which epochs they need."""
        return self._clock() >= self._settled_at_s

    async def bring(self, epoch: Epoch, commit: Callable[[], None], show: ShowStage) -> None:
        """Lets workers load what the epoch needs, then calls `commit`. If it raises, nothing stays of it.

        One epoch at a time. Raises MoesaicError.
        """
        assert self._passage is None
        passage = _Passage(epoch, commit, show, asyncio.get_running_loop().create_future())
        self._epochs.prepare(epoch)
        try:
            check_room(self._desired(), self._observed())
            self._passage = passage
            self._controller.publish()
            async with asyncio.timeout(self._load_timeout_s):
                await passage.ended
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the workers did not hold epoch {epoch.id} after {self._load_timeout_s:.0f} s"
            ) from error
        finally:
            self._passage = None
            self._epochs.prepare(None)
            self._controller.publish()

    async def wait_until_idle(self) -> None:
        """Until nothing is left to do for now, at most as long as loading may take."""
        self._controller.changed.beat()
        await self._idle.wait(self._load_timeout_s)

    def _plan(self) -> tuple[Action, ...]:
        if not self._controller.is_informed:
            return ()
        return plan(self._desired(), self._observed())

    def _depends_on_time(self, actions: Sequence[Action]) -> bool:
        return bool(
            actions or self._passage or self._resting or self._epochs.is_draining or not self.is_settled
        )

    def _desired(self) -> Desired:
        living = self._epochs.living()
        return Desired(
            living=living,
            replicas=self._replicas,
            base_slots=self._base_slots,
            footprints=self._footprints(living),
            base_footprints=self._base_footprints,
            candidate=self._epochs.candidate,
        )

    def _observed(self) -> Observed:
        now_s = self._clock()
        self._resting = {name: until for name, until in self._resting.items() if until > now_s}
        footprints = self._footprints(self._epochs.living())
        workers = tuple(self._worker(sighting, footprints) for sighting in self._controller.workers())
        passage = self._passage
        published = {passage.epoch.id} if passage is not None and passage.is_published else set()
        return Observed(workers, frozenset(published), settled=self.is_settled)

    def _worker(self, sighting: WorkerSighting, footprints: Mapping[ExpertVersion, Footprint]) -> Worker:
        facts = sighting.facts
        replica = facts.replica
        leaving = frozenset(one for one in replica.holdings if (replica.worker, one) in self._leaving)
        holdings = replica.holdings - leaving
        return Worker(
            name=replica.worker,
            host=sighting.host,
            home=sighting.home,
            holdings=holdings,
            unproven=holdings & self._controller.withheld(replica.incarnation),
            leaving=leaving,
            available_bytes=facts.available_bytes,
            bytes_per_parameter=self._bytes_per_parameter(facts, footprints),
            resting=replica.worker in self._resting,
        )

    def _bytes_per_parameter(
        self, facts: WorkerFacts, footprints: Mapping[ExpertVersion, Footprint]
    ) -> float:
        """From all that it holds; four where that is nothing. What nobody needs any more counts like the folder's."""
        held = [
            footprints.get(version) or self._base_footprints[version.address.layer]
            for version in facts.replica.holdings
        ]
        parameters = sum(footprint.parameters for footprint in held)
        floating_bytes = facts.weight_bytes - sum(footprint.fixed_bytes for footprint in held)
        return floating_bytes / parameters if parameters and floating_bytes > 0 else 4.0

    def _footprints(self, living: Iterable[Epoch]) -> dict[ExpertVersion, Footprint]:
        """Of the versions that bundles brought."""
        footprints: dict[ExpertVersion, Footprint] = {}
        for epoch in living:
            for bundle in epoch.bundles:
                try:
                    by_digest = _footprints_of(self._bundles.manifest(bundle.digest))
                except MoesaicError:  # it was deleted or damaged: whoever has to load it says so
                    continue
                for address in bundle.experts:
                    digest = epoch.versions[address]
                    footprints[ExpertVersion(address, digest)] = by_digest[digest]
        return footprints

    async def _carry_out(self, actions: Sequence[Action], beside: asyncio.TaskGroup) -> None:
        """Workers act side by side, each of them one action after another. What nobody needs is given up beside the
        rounds, because it waits for routers."""
        needed = self._needed()
        by_worker: dict[str, list[Load | Probe | Unload]] = {}
        for action in actions:
            match action:
                case Publish():
                    self._publish()
                case Commit():
                    self._commit()
                case Unload(name, versions) if needed.isdisjoint(versions):
                    self._leaving.update((name, version) for version in versions)
                    beside.create_task(self._give_up(action))
                case _:
                    by_worker.setdefault(action.worker, []).append(action)
        await asyncio.gather(*(self._act_in_turn(name, group) for name, group in by_worker.items()))

    async def _act_in_turn(self, name: str, actions: Iterable[Load | Probe | Unload]) -> None:
        for action in actions:
            found = [one for one in self._controller.workers() if one.facts.replica.worker == name]
            if not found:
                return
            try:
                async with self._turn(name):
                    await self._act(action, found[0].facts)
            except MoesaicError as error:
                self._fail(action, error)
                return

    async def _act(self, action: Load | Probe | Unload, facts: WorkerFacts) -> None:
        address, incarnation = facts.replica.address, facts.replica.incarnation
        match action:
            case Load(_, bundle, versions):
                await self._load(action, address, incarnation)
            case Probe(_, bundle, versions):
                for outcome in await self._calls.probe(address, bundle, versions):
                    if not outcome.ok:
                        layer, slot = outcome.version.address
                        raise FailedPrecondition(
                            f"bundle: layer {layer} slot {slot}: the answers to its probe vectors differ by "
                            f"{outcome.max_difference:.3g} from those expected, whose largest is "
                            f"{outcome.max_expected:.3g}",
                            field="bundle",
                            reason="PROBE_FAILED",
                        )
                self._failpoints("rollout.probed")
                self._controller.admit(incarnation, frozenset(versions))
                self._show(control_pb2.CHANGE_STAGE_PROBE, "the experts answer as their bundle expects")
            case Unload(_, versions):
                await self._unload(action, address, incarnation)

    async def _load(self, action: Load, address: str, incarnation: str) -> None:
        self._failpoints("rollout.load")
        if action.bundle != MODEL_FOLDER:
            self._controller.withhold(incarnation, frozenset(action.versions))
        self._show_loaded(action.worker, ())
        async for version in self._calls.load(address, action.bundle, action.versions):
            self._show_loaded(action.worker, (version,))
        self._failpoints("rollout.loaded")
        self._leaving.difference_update((action.worker, version) for version in action.versions)
        await self._check_contents(action, action.versions)

    async def _unload(self, action: Unload, address: str, incarnation: str) -> None:
        """A copy makes room, of which there is another one. Routers must know a table without it before it goes."""
        versions = frozenset(action.versions)
        was_withheld = self._controller.withheld(incarnation) & versions
        self._controller.withhold(incarnation, versions)
        try:
            await self._wait_for_routers()
            await self._take_off(action, address, action.versions)
        except MoesaicError:
            self._controller.admit(incarnation, versions - was_withheld)
            raise
        self._controller.admit(incarnation, versions)

    async def _give_up(self, action: Unload) -> None:
        """Of the versions, those that nobody needs once routers know it."""
        name = action.worker
        try:
            await self._wait_for_routers()
            async with self._turn(name):
                replicas = [sighting.facts.replica for sighting in self._controller.workers()]
                for replica in replicas:
                    idle = (replica.holdings & set(action.versions)) - self._needed()
                    if replica.worker == name and idle:
                        await self._take_off(action, replica.address, sorted(idle))
        except MoesaicError as error:
            self._fail(action, error)
        finally:
            self._leaving.difference_update((name, version) for version in action.versions)
            self._controller.changed.beat()

    async def _take_off(self, action: Unload, address: str, versions: Sequence[ExpertVersion]) -> None:
        """Tells a worker to unload versions, of which routers know already that it has them no more."""
        self._failpoints("rollout.unload")
        await self._calls.unload(address, versions)
        self._failpoints("rollout.unloaded")
        await self._check_contents(action, versions)

    async def _check_contents(self, action: Load | Unload, versions: Iterable[ExpertVersion]) -> None:
        """Raises Unavailable for a worker whose contents are not what it said that it has made of them. It rests then, else it
        would be told the same again at once, and for ever."""
        await self._controller.look_again(action.worker)
        for sighting in self._controller.workers():
            replica = sighting.facts.replica
            is_done = replica.holdings.issuperset if isinstance(action, Load) else replica.holdings.isdisjoint
            if replica.worker == action.worker and not is_done(versions):
                word = "loaded" if isinstance(action, Load) else "gave up"
                raise Unavailable(f"what it {word} does not show in what it says to hold")

    def _turn(self, name: str) -> asyncio.Lock:
        return self._in_turn.setdefault(name, asyncio.Lock())

    def _needed(self) -> frozenset[ExpertVersion]:
        living = self._epochs.living()
        return frozenset[ExpertVersion]().union(*(epoch.expert_versions for epoch in living))

    async def _wait_for_routers(self) -> None:
        """Until those that report know the newest table. A router that falls silent is not waited for."""
        until_s = self._clock() + LATELY_S
        while not self._reports.saw(self._controller.revision, self._clock()) and self._clock() < until_s:
            await asyncio.sleep(_POLL_S)

    def _publish(self) -> None:
        passage = self._passage
        if passage is not None:
            self._failpoints("rollout.publish")
            passage.is_published = True
            self._controller.publish()
            self._show(control_pb2.CHANGE_STAGE_PUBLISH, "routers are told where the experts are")

    def _commit(self) -> None:
        passage = self._passage
        if passage is None or passage.ended.done():
            return
        self._failpoints("rollout.commit")
        try:
            passage.commit()
        except MoesaicError as error:
            passage.ended.set_exception(error)
            return
        self._failpoints("rollout.committed")
        passage.ended.set_result(None)
        self._controller.publish()

    def _fail(self, action: Load | Probe | Unload, error: MoesaicError) -> None:
        fields = {"process": action.worker, "action": type(action).__name__, "reason": error.message}
        log.warning("a step of a rollout failed", extra={"fields": fields})
        self._resting[action.worker] = self._clock() + REST_S
        passage = self._passage
        if passage is None or passage.ended.done() or isinstance(error, Unavailable | DeadlineExceeded):
            return
        if not isinstance(action, Unload) and self._is_for(passage.epoch, action.versions):
            passage.ended.set_exception(error)

    def _is_for(self, candidate: Epoch, versions: Iterable[ExpertVersion]) -> bool:
        """Whether the candidate alone needs some of the versions."""
        others = (epoch.expert_versions for epoch in self._epochs.living() if epoch.id != candidate.id)
        return bool(candidate.expert_versions & set(versions) - frozenset[ExpertVersion]().union(*others))

    def _show_loaded(self, worker: str, versions: Iterable[ExpertVersion]) -> None:
        passage = self._passage
        if passage is not None:
            passage.loaded |= {(worker, version) for version in versions}
            done = len({version for _, version in passage.loaded if version in passage.epoch.expert_versions})
            total = len(passage.epoch.expert_versions - self._in_use_without(passage.epoch))
            self._show(control_pb2.CHANGE_STAGE_LOAD, "workers load the experts", done, total)

    def _in_use_without(self, candidate: Epoch) -> frozenset[ExpertVersion]:
        others = (epoch.expert_versions for epoch in self._epochs.living() if epoch.id != candidate.id)
        return frozenset[ExpertVersion]().union(*others)

    def _show(self, stage: control_pb2.ChangeStage, detail: str, done: int = 0, total: int = 0) -> None:
        if self._passage is not None:
            self._passage.show(stage, detail, done, total)


def _footprints_of(manifest: Manifest) -> dict[bytes, Footprint]:
    """By the digest of the version."""
    footprints = {}
    for expert in manifest.experts:
        parameters, fixed_bytes = 0, 0
        for tensor in expert.weights.values():
            facts = manifest.tensors[tensor]
            size = math.prod(facts.shape)
            if facts.dtype == "I8":
                fixed_bytes += size
            else:
                parameters += size
        footprints[bytes.fromhex(expert.version)] = Footprint(parameters, fixed_bytes)
    return footprints
