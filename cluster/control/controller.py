"""The controller: observes the processes, names the epoch and publishes the routing table.

It is level-triggered: it follows every process by itself and decides by what it observes now, so that it may
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

from cluster.control.loss import BEAT_S, Losses
from cluster.control.process_report import CANNOT_START, EVIDENCE, PROCESS_DIED, ProcessReport
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion, merge_versions
from moesaic.errors import FailedPrecondition, MoesaicError, Unavailable
from moesaic.routing_table import Replica, RoutingTable, Snapshot
from moesaic.v1 import common_pb2, control_pb2

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

    async def describe(self, address: str) -> Replica:
        """What a READY worker holds. Raises Unavailable."""
        ...


class Controller:
    """Follows the members of a cluster. `run` is its loop; the other methods may be called at any time."""

    def __init__(
        self,
        cluster: Cluster,
        observer: ProcessObserver,
        *,
        first_revision: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_revision` is above every revision that an earlier controller of this cluster published."""
        self._cluster = cluster
        self._observer = observer
        self._sleep = sleep
        self._clock = clock
        self._losses = Losses(cluster.workers)
        self._reports: dict[str, ProcessReport] = {}
        # Why a process does not answer; those of them that are lost.
        self._silent: dict[str, MoesaicError] = {}
        self._lost: set[str] = set()
        self._replicas: dict[str, Replica] = {}
        self._unobserved = set(cluster.workers)
        self._revision = first_revision
        self._epoch: Epoch | None = None
        self._problem = ""
        # Why workers that run are not used, or not for all that they hold.
        self._refused: dict[str, str] = {}
        self._snapshot: Snapshot | None = None
        self._published = asyncio.Event()

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
            published, snapshot = self._published, self._snapshot
            if snapshot is None or snapshot is sent:
                await published.wait()
            else:
                sent = snapshot
                yield snapshot

    def topology(self) -> control_pb2.GetTopologyResponse:
        """All members and the last observation of each."""
        return control_pb2.GetTopologyResponse(
            model=self._cluster.model,
            epoch=self._epoch.id if self._epoch else "",
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
                replica = await self._replica_of(report)
            except MoesaicError as error:
                self._miss(name, error, asked_s)
                seen = 0
                await self._sleep(RETRY_S)
            else:
                seen = report.revision
                self._keep(report, replica)

    async def _replica_of(self, report: ProcessReport) -> Replica | None:
        """The worker as a replica, described again whenever its report changed, as with new contents."""
        name = report.name
        if name not in self._cluster.workers or not report.ready:
            return None
        last, known = self._reports.get(name), self._replicas.get(name)
        if known is not None and known.address != report.address:
            self._set_replica(name, None)  # another process has taken its place
            known = None
        changed = last is None or last.revision != report.revision or name in self._silent
        if known is not None and not changed:
            return known
        replica = await self._observer.describe(report.address)
        if replica.worker != name:
            raise Unavailable(f"{report.address} is {replica.worker} now", reason=PROCESS_DIED)
        return replica

    def _keep(self, report: ProcessReport, replica: Replica | None) -> None:
        self._losses.hear(report.name, self._clock())
        self._silent.pop(report.name, None)
        self._lost.discard(report.name)
        self._reports[report.name] = report
        self._set_replica(report.name, replica)

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
        self._set_replica(name, None)

    def _log_absence(self, name: str, error: MoesaicError) -> None:
        """Only what was READY can be lost. Anything else starts, which on a busy machine takes its time."""
        report, fields = self._reports.get(name), {"process": name, "reason": error.message}
        if report is not None and report.ready:
            log.warning("process lost", extra={"fields": fields})
        elif error.reason == CANNOT_START or (report is not None and error.reason in EVIDENCE):
            log.warning("process did not start", extra={"fields": fields})
        else:
            log.info("process is starting", extra={"fields": fields})

    def _set_replica(self, name: str, replica: Replica | None) -> None:
        self._unobserved.discard(name)
        if replica is not None:
            self._replicas[name] = replica
        else:
            self._replicas.pop(name, None)
        if not self._unobserved:
            self._publish_changes()

    def _publish_changes(self) -> None:
        if self._epoch is None:
            self._epoch = self._name_epoch()
        self._refused = self._refuse_others()
        served = (self._served(replica) for _, replica in sorted(self._replicas.items()))
        replicas = tuple(replica for replica in served if replica.holdings)
        if self._snapshot is not None and replicas == self._snapshot.table.replicas:
            return
        self._revision += 1
        self._snapshot = Snapshot(self._epoch, RoutingTable(self._revision, replicas))
        log.info(
            "routing table",
            extra={"fields": {"revision": self._revision, "workers": [r.worker for r in replicas]}},
        )
        published, self._published = self._published, asyncio.Event()
        published.set()

    def _name_epoch(self) -> Epoch | None:
        """The first epoch, derived from what the workers hold; None while some expert is not held."""
        self._problem = ""
        try:
            versions = merge_versions(
                [replica.holdings for replica in self._replicas.values()], self._cluster.experts
            )
        except FailedPrecondition as error:
            if error.reason != "EXPERTS_MISSING":  # the workers are still starting
                log.error("no epoch", extra={"fields": {"reason": error.reason}})
                self._problem = error.message + self._who_disagrees()
            return None
        return Epoch.of(self._cluster.model, versions)

    def _who_disagrees(self) -> str:
        """The first two workers that hold different versions of a slot, for a person; empty if none do."""
        holders: dict[ExpertAddress, tuple[str, bytes]] = {}
        for name, replica in sorted(self._replicas.items()):
            for address, digest in sorted(replica.holdings):
                other, version = holders.setdefault(address, (name, digest))
                if version != digest:
                    return (
                        f": {other} on {self._node(other)} and {name} on {self._node(name)} "
                        "read different model folders"
                    )
        return ""

    def _refuse_others(self) -> dict[str, str]:
        """The workers that hold another version of an expert than the epoch names, and not that one, and why.

        What they hold of other experts is used all the same.
        """
        if self._epoch is None:
            return {}
        wanted, refused = self._epoch.expert_versions, {}
        for name, replica in self._replicas.items():
            held = {version.address for version in replica.holdings & wanted}
            others = {version.address for version in replica.holdings} & self._epoch.versions.keys() - held
            if others:
                refused[name] = self._describe_others(name, min(others), len(others))
        for name in refused.keys() - self._refused.keys():
            log.error("replica refused", extra={"fields": {"process": name, "reason": refused[name]}})
        return refused

    def _describe_others(self, name: str, first: ExpertAddress, count: int) -> str:
        assert self._epoch is not None
        wanted = ExpertVersion(first, self._epoch.versions[first])
        holders = [other for other, replica in self._replicas.items() if wanted in replica.holdings]
        other = f"{holders[0]} on {self._node(holders[0])}" if holders else "the epoch"
        return (
            f"it holds other weights than {other} in {count} of its experts, first layer {first.layer} "
            f"slot {first.slot}: the model's folder on {self._node(name)} is another one, or was changed"
        )

    def _node(self, name: str) -> str:
        report = self._reports.get(name)
        return f"node {report.node}" if report is not None else "an unknown node"

    def _served(self, replica: Replica) -> Replica:
        """The replica with only those versions that some epoch in use names."""
        if self._epoch is None:
            return replica
        return replace(replica, holdings=replica.holdings & self._epoch.expert_versions)

    def _process(self, member: Member) -> control_pb2.Process:
        process = control_pb2.Process(
            name=member.name,
            role=member.role,
            state=control_pb2.PROCESS_STATE_PENDING,
            device=member.device,
            experts=[
                common_pb2.ExpertAddress(layer=address.layer, slot=address.slot)
                for address in sorted(member.experts)
            ],
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
