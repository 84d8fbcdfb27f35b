"""The controller: observes the processes, names the epoch and publishes the routing table.

It is level-triggered: it follows every process by itself and decides by what it observes now, so that it may
restart at any time. It publishes nothing before it has an observation of every worker: after a restart, half
a table would take replicas away from routers that still use them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.control.process_report import ProcessReport
from moesaic.epoch import Epoch, ExpertAddress, merge_versions
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
    ) -> None:
        """`first_revision` is above every revision that an earlier controller of this cluster published."""
        self._cluster = cluster
        self._observer = observer
        self._sleep = sleep
        self._reports: dict[str, ProcessReport] = {}
        self._gone: dict[str, str] = {}
        self._replicas: dict[str, Replica] = {}
        self._unobserved = set(cluster.workers)
        self._revision = first_revision
        self._epoch: Epoch | None = None
        self._problem = ""
        self._snapshot: Snapshot | None = None
        self._published = asyncio.Event()

    async def run(self) -> None:
        """Follows all members until it is cancelled."""
        async with asyncio.TaskGroup() as group:
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

    async def _follow(self, name: str) -> None:
        seen = 0
        while True:
            try:
                report = await self._observer.report(name, seen)
                replica = await self._replica_of(report)
            except MoesaicError as error:
                self._lose(name, error.message)
                seen = 0
                await self._sleep(RETRY_S)
            else:
                seen = report.revision
                self._keep(report, replica)

    async def _replica_of(self, report: ProcessReport) -> Replica | None:
        """The worker as a replica, described again whenever its report changed, as with new contents."""
        if report.name not in self._cluster.workers or not report.ready:
            return None
        last, known = self._reports.get(report.name), self._replicas.get(report.name)
        if known is not None and last is not None and last.revision == report.revision:
            return known
        replica = await self._observer.describe(report.address)
        if replica.worker != report.name:
            raise Unavailable(f"{report.address} is {replica.worker} now")
        return replica

    def _keep(self, report: ProcessReport, replica: Replica | None) -> None:
        self._gone.pop(report.name, None)
        self._reports[report.name] = report
        self._set_replica(report.name, replica)

    def _lose(self, name: str, reason: str) -> None:
        if name not in self._gone:
            log.warning("process lost", extra={"fields": {"process": name, "reason": reason}})
        self._gone[name] = reason
        self._set_replica(name, None)

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
                self._problem = error.message
            return None
        return Epoch.of(self._cluster.model, versions)

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
        report, reason = self._reports.get(member.name), self._gone.get(member.name)
        if report is not None:
            process.restarts = report.restarts
        if reason is not None:
            process.detail = reason
        elif report is not None:
            _fill(process, report)
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
