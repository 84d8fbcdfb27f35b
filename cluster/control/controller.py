"""The controller: observes the processes, and publishes the epochs in use and the routing table.

Which epochs are in use is commanded (`epochs_in_use.py`); only the first one is named after what the workers hold. It is level-triggered: it follows every process by itself and decides by what it observes now, so that it may
restart at any time. It publishes nothing before it has an observation of every worker: after a restart, half
a table would take replicas away from routers that still use them. For the same reason a worker that is merely
silent stays in the table until `loss.py` says that it is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.control.epoch_store import Decision
from cluster.control.epochs_in_use import EpochsInUse
from cluster.control.head import Head
from cluster.control.loss import BEAT_S, Losses
from cluster.control.process_report import CANNOT_START, EVIDENCE, NOT_SERVING, PROCESS_DIED, ProcessReport
from cluster.control.pulse import Pulse
from cluster.control.worker_facts import WorkerFacts, WorkerSighting
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion, address_to_proto, merge_versions
from moesaic.errors import FailedPrecondition, MoesaicError, Unavailable
from moesaic.routing_table import Canary, Replica, RoutingTable, Snapshot
from moesaic.v1 import control_pb2

log = logging.getLogger(__name__)

# The pause before a process that did not answer is asked again.
RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Member:
    """A process that belongs to the cluster, whether it runs or not. Only expert workers have `experts`."""

    name: str
    role: control_pb2.ProcessRole
    experts: frozenset[ExpertAddress] = frozenset()
    device: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The desired state: the experts of the model and the processes that serve it."""

    model: str
    experts: frozenset[ExpertAddress]
    members: tuple[Member, ...]
    # The fingerprint of the model folder.
    base: bytes = b""

    @property
    def workers(self) -> frozenset[str]:
        return frozenset(
            member.name for member in self.members if member.role == control_pb2.PROCESS_ROLE_EXPERT_WORKER
        )


class ProcessObserver(Protocol):
    """How the controller observes processes."""

    async def report(self, name: str, seen: int) -> ProcessReport:
        """The report of a process as soon as its revision is not `seen`, else the same report after a while.

        Raises Unavailable as soon as the process is gone or does not answer.
        """
        ...

    async def describe(self, address: str) -> WorkerFacts:
        """What a READY worker holds. Raises Unavailable."""
        ...


class Controller:
    """Follows the members of a cluster. `run` is its loop; the other methods may be called at any time."""

    def __init__(
        self,
        cluster: Cluster,
        observer: ProcessObserver,
        epochs: EpochsInUse,
        *,
        first_revision: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_revision` is above every revision that an earlier controller of this cluster published."""
        self._cluster = cluster
        self._observer = observer
        self._epochs = epochs
        # Beats after every change of what is observed or published.
        self.changed = Pulse()
        self._sleep = sleep
        self._clock = clock
        self._losses = Losses(cluster.workers)
        self._reports: dict[str, ProcessReport] = {}
        # Why a process does not answer; those of them that are lost.
        self._silent: dict[str, MoesaicError] = {}
        self._lost: set[str] = set()
        self._workers: dict[str, WorkerFacts] = {}
        # The slots of the model folder that each worker was first seen with, where nobody has placed them.
        self._homes = {member.name: member.experts for member in cluster.members}
        # By incarnation, the versions that it holds and that must not be called: not probed yet, or about to go.
        self._withheld: dict[str, frozenset[ExpertVersion]] = {}
        self._unobserved = set(cluster.workers)
        self._revision = first_revision
        # Epochs of which every version was held at some time.
        self._complete: set[str] = set()
        self._problem = ""
        # Why workers that run are not used, or not for all that they hold.
        self._refused: dict[str, str] = {}
        self._snapshot: Snapshot | None = None

    async def run(self) -> None:
        """Follows all members until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            for member in self._cluster.members:
                group.create_task(self._follow(member.name))

    async def watch(self) -> AsyncIterator[Snapshot]:
        """The newest snapshot once there is one, then every newer one; slow readers skip some in between."""
        sent: Snapshot | None = None
        while True:
            snapshot = self._snapshot
            if snapshot is None or snapshot is sent:
                await self.changed.wait()
            else:
                sent = snapshot
                yield snapshot

    @property
    def revision(self) -> int:
        """That of the newest routing table."""
        return self._revision

    @property
    def is_informed(self) -> bool:
        """Whether every worker was heard of, so that something is published."""
        return not self._unobserved

    def workers(self) -> list[WorkerSighting]:
        """The workers that answer, by name."""
        return [
            WorkerSighting(facts, self._host(name), self._homes[name])
            for name, facts in sorted(self._workers.items())
        ]

    def withheld(self, incarnation: str) -> frozenset[ExpertVersion]:
        return self._withheld.get(incarnation, frozenset())

    def withhold(self, incarnation: str, versions: frozenset[ExpertVersion]) -> None:
        """Keeps versions that this worker holds, or will hold, out of the routing table."""
        self._withheld[incarnation] = self.withheld(incarnation) | versions
        self.publish()

    def admit(self, incarnation: str, versions: frozenset[ExpertVersion]) -> None:
        """The inverse of `withhold`."""
        self._withheld[incarnation] = self.withheld(incarnation) - versions
        self.publish()

    async def look_again(self, name: str) -> None:
        """Describes a worker anew whose contents have changed. Raises Unavailable, also when another process has taken the
        worker's place: what it holds is seen when that one reports."""
        known = self._workers.get(name)
        if known is None:
            return
        facts = await self._observer.describe(known.replica.address)
        if self._workers.get(name) is not known:
            return
        if facts.replica.incarnation != known.replica.incarnation:
            raise Unavailable(f"{name} was started again")
        self._check_layers(facts.replica)
        self._set_worker(name, facts)

    def publish(self) -> None:
        """Publishes what has changed, once every worker was heard of."""
        if not self._unobserved:
            self._publish_changes()
        self.changed.beat()

    def topology(self) -> control_pb2.GetTopologyResponse:
        """All members and the last observation of each."""
        return control_pb2.GetTopologyResponse(
            model=self._cluster.model,
            epoch=self._epochs.head.current if self._epochs.head else "",
            revision=self._revision if self._snapshot else 0,
            processes=[self._process(member) for member in self._cluster.members],
        )

    async def _beat(self) -> None:
        """Shows by its own pauses when this process slept, so that its unanswered questions say nothing."""
        while True:
            self._losses.beat(self._clock())
            await self._sleep(BEAT_S)

    async def _follow(self, name: str) -> None:
        seen = 0
        while True:
            asked_s = self._clock()
            try:
                report = await self._observer.report(name, seen)
                facts = await self._facts_of(report)
            except MoesaicError as error:
                self._miss(name, error, asked_s)
                seen = 0
                await self._sleep(RETRY_S)
            else:
                seen = report.revision
                self._keep(report, facts)

    async def _facts_of(self, report: ProcessReport) -> WorkerFacts | None:
        """What the worker holds, described again whenever its report changed, as with new contents."""
        name = report.name
        if name not in self._cluster.workers or not report.ready:
            return None
        last, known = self._reports.get(name), self._workers.get(name)
        if known is not None and known.replica.address != report.address:
            self._set_worker(name, None)  # another process has taken its place
            known = None
        changed = last is None or last.revision != report.revision or name in self._silent
        if known is not None and not changed:
            return known
        facts = await self._observer.describe(report.address)
        if facts.replica.worker != name:
            raise Unavailable(f"{report.address} is {facts.replica.worker} now", reason=PROCESS_DIED)
        self._check_layers(facts.replica)
        return facts

    def _check_layers(self, replica: Replica) -> None:
        """Raises Unavailable for a worker of another model: bundles bring slots, never layers."""
        known = {address.layer for address in self._cluster.experts}
        if strange := {version.address.layer for version in replica.holdings} - known:
            raise Unavailable(
                f"it holds experts of layer {min(strange)}, in which the model has none", reason=NOT_SERVING
            )

    def _keep(self, report: ProcessReport, facts: WorkerFacts | None) -> None:
        self._losses.hear(report.name, self._clock())
        self._silent.pop(report.name, None)
        self._lost.discard(report.name)
        self._reports[report.name] = report
        self._set_worker(report.name, facts)

    def _miss(self, name: str, error: MoesaicError, asked_s: float) -> None:
        """The process did not answer. Its replica stays unless it counts as lost."""
        self._silent[name] = error
        if error.reason in EVIDENCE:
            self._losses.die(name)
        elif not self._losses.miss(name, asked_s, self._clock()):
            return
        if name not in self._lost:
            self._log_absence(name, error)
        self._lost.add(name)
        self._set_worker(name, None)

    def _log_absence(self, name: str, error: MoesaicError) -> None:
        """Only what was READY can be lost. Anything else starts, which on a busy machine takes its time."""
        report, fields = self._reports.get(name), {"process": name, "reason": error.message}
        if report is not None and report.ready:
            log.warning("process lost", extra={"fields": fields})
        elif error.reason == CANNOT_START or (report is not None and error.reason in EVIDENCE):
            log.warning("process did not start", extra={"fields": fields})
        else:
            log.info("process is starting", extra={"fields": fields})

    def _set_worker(self, name: str, facts: WorkerFacts | None) -> None:
        was = self._workers.get(name)
        is_news = facts != was or name in self._unobserved or self._snapshot is None
        self._unobserved.discard(name)
        if not is_news:
            return
        if was is not None and (facts is None or facts.replica.incarnation != was.replica.incarnation):
            self._withheld.pop(was.replica.incarnation, None)
        if facts is not None:
            self._workers[name] = facts
            if not self._homes[name]:
                held = {version.address for version in facts.replica.holdings}
                self._homes[name] = self._cluster.experts & held
        else:
            self._workers.pop(name, None)
        self.publish()

    def _publish_changes(self) -> None:
        if self._epochs.head is None:
            self._name_first_epoch()
        self._refused = self._refuse_others()
        wanted = frozenset[ExpertVersion]().union(*(epoch.expert_versions for epoch in self._epochs.living()))
        served = (self._served(self._workers[name].replica, wanted) for name in sorted(self._workers))
        replicas = tuple(replica for replica in served if replica.holdings)
        held = frozenset[ExpertVersion]().union(*(replica.holdings for replica in replicas))
        epoch = self._once_complete(self._epochs.current, held)
        told = Snapshot(
            epoch, RoutingTable(self._revision, replicas), self._canary(held), self._epochs.drain_s
        )
        if told == self._snapshot:
            return
        self._revision += 1
        self._snapshot = replace(told, table=RoutingTable(self._revision, replicas))
        log.info(
            "routing table",
            extra={"fields": {"revision": self._revision, "workers": [r.worker for r in replicas]}},
        )

    def _canary(self, held: frozenset[ExpertVersion]) -> Canary | None:
        head, epoch = self._epochs.head, self._once_complete(self._epochs.canary, held)
        if head is None or head.canary is None or epoch is None:
            return None
        return Canary(epoch, head.canary.share, head.canary.shadow_share)

    def _once_complete(self, epoch: Epoch | None, held: frozenset[ExpertVersion]) -> Epoch | None:
        """An epoch that routers may be told of: each of its versions is held, or was when they were told first."""
        if epoch is not None and epoch.id not in self._complete and epoch.expert_versions <= held:
            self._complete.add(epoch.id)
        return epoch if epoch is not None and epoch.id in self._complete else None

    def _name_first_epoch(self) -> None:
        """The first epoch is what the workers hold; there is none while some expert is not held."""
        self._problem = ""
        try:
            versions = merge_versions(
                [facts.replica.holdings for facts in self._workers.values()], self._cluster.experts
            )
        except FailedPrecondition as error:
            if error.reason != "EXPERTS_MISSING":  # the workers are still starting
                log.error("no epoch", extra={"fields": {"reason": error.reason}})
                self._problem = error.message + self._who_disagrees()
            return
        epoch = Epoch.of(self._cluster.model, versions, base=self._cluster.base)
        self._epochs.prepare(epoch)
        self._epochs.commit(None, Head(epoch.id), Decision("first", epoch.id), self._clock())

    def _who_disagrees(self) -> str:
        """The first two workers that hold different versions of a slot, for a person; empty if none do."""
        holders: dict[ExpertAddress, tuple[str, bytes]] = {}
        for name, facts in sorted(self._workers.items()):
            for address, digest in sorted(facts.replica.holdings):
                other, version = holders.setdefault(address, (name, digest))
                if version != digest:
                    return (
                        f": {other} on {self._node(other)} and {name} on {self._node(name)} "
                        "read different model folders"
                    )
        return ""

    def _refuse_others(self) -> dict[str, str]:
        """The workers that hold versions that no epoch names in slots of which they hold no other, and why.

        What they hold of other experts is used all the same.
        """
        current = self._epochs.current
        if current is None:
            return {}
        known, refused = self._epochs.known, {}
        for name, facts in self._workers.items():
            holdings = facts.replica.holdings
            held = {version.address for version in holdings & known}
            others = {version.address for version in holdings} & current.versions.keys() - held
            if others:
                refused[name] = self._describe_others(name, current, min(others), len(others))
        for name in refused.keys() - self._refused.keys():
            log.error("replica refused", extra={"fields": {"process": name, "reason": refused[name]}})
        return refused

    def _describe_others(self, name: str, current: Epoch, first: ExpertAddress, count: int) -> str:
        wanted = ExpertVersion(first, current.versions[first])
        holders = [other for other, facts in self._workers.items() if wanted in facts.replica.holdings]
        other = f"{holders[0]} on {self._node(holders[0])}" if holders else "the epoch"
        return (
            f"it holds other weights than {other} in {count} of its experts, first layer {first.layer} "
            f"slot {first.slot}: the model's folder on {self._node(name)} is another one or was changed, or the "
            "epoch was made with another dtype"
        )

    def _node(self, name: str) -> str:
        return f"node {self._host(name)}" if name in self._reports else "an unknown node"

    def _host(self, name: str) -> str:
        report = self._reports.get(name)
        return "" if report is None else report.node

    def _served(self, replica: Replica, wanted: frozenset[ExpertVersion]) -> Replica:
        """The replica with only those versions that some epoch in use names, and that may be called."""
        if self._epochs.head is None:
            return replica
        return replace(replica, holdings=replica.holdings & wanted - self.withheld(replica.incarnation))

    def _process(self, member: Member) -> control_pb2.Process:
        process = control_pb2.Process(
            name=member.name,
            role=member.role,
            state=control_pb2.PROCESS_STATE_PENDING,
            device=member.device,
            experts=list(map(address_to_proto, sorted(member.experts))),
        )
        report, silent = self._reports.get(member.name), self._silent.get(member.name)
        if report is not None:
            process.restarts = report.restarts
            if member.name not in self._lost:
                _fill(process, report)
        if member.name in self._refused:
            process.state = control_pb2.PROCESS_STATE_FAILED
            process.detail = self._refused[member.name]
        if silent is not None:
            process.detail = silent.message
            if silent.reason == CANNOT_START:
                process.state = control_pb2.PROCESS_STATE_FAILED
        if self._problem and member.role == control_pb2.PROCESS_ROLE_CONTROLLER:
            process.state, process.detail = control_pb2.PROCESS_STATE_FAILED, self._problem
        return process


def _fill(process: control_pb2.Process, report: ProcessReport) -> None:
    process.state = report.state
    process.address = report.address
    process.node = report.node
    process.pid = report.pid
    process.loaded_bytes = report.loaded_bytes
    process.total_bytes = report.total_bytes
    process.detail = report.detail
