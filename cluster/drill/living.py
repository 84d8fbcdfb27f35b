"""The processes of a cluster under drill: who they are now, and whether all of them are well."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from cluster.drill.faults import Targets
from cluster.drill.site import POISONED, Site
from cluster.observation.observer import Observation, Observer
from cluster.processes.specs import CONTROLLER
from moesaic.errors import FailedPrecondition, MoesaicError
from moesaic.v1 import control_pb2

GCS = "gcs"
_GCS_PROGRAM = "gcs_server"
_WORKER, _ROUTER = control_pb2.PROCESS_ROLE_EXPERT_WORKER, control_pb2.PROCESS_ROLE_ROUTER


@dataclass(frozen=True, slots=True)
class Living:
    """The processes of the cluster as last seen, all of them well. `pids`: of those on this host, by name."""

    pids: Mapping[str, int]
    targets: Targets


class Cluster:
    """A site, looked at again before every fault and after it."""

    def __init__(self, site: Site, observer: Observer) -> None:
        self.site = site
        self.observer = observer

    async def look(self) -> Living | None:
        """The processes if all are READY, else None."""
        try:
            seen = await self.observer.observe_routers()
        except MoesaicError:
            return None
        return self._by_hand(seen) if self.site.by_hand else _of_topology(seen.topology)

    def _by_hand(self, seen: Observation) -> Living | None:
        """Without a controller: well while every expert has a worker and all of them are connected."""
        workers = {traffic.worker for traffic in seen.entry.workers if traffic.connected}
        if seen.entry.experts_without_worker or not workers.issuperset(self.site.by_hand):
            return None
        targets = Targets({}, poisonable=(POISONED,) if POISONED in self.site.by_hand else ())
        return Living({name: child.pid for name, child in self.site.by_hand.items()}, targets)


def _of_topology(topology: control_pb2.GetTopologyResponse | None) -> Living | None:
    if topology is None or not topology.processes:
        return None
    if any(process.state != control_pb2.PROCESS_STATE_READY for process in topology.processes):
        return None
    local = {process.name: process for process in topology.processes if _is_here(process)}
    pids = {name: process.pid for name, process in local.items()}
    if CONTROLLER in pids and (gcs := _find_gcs(pids[CONTROLLER])) is not None:
        pids[GCS] = gcs
    here = {process.node for process in local.values()}
    return Living(
        pids,
        Targets(
            workers={
                name: frozenset((expert.layer, expert.slot) for expert in process.experts)
                for name, process in local.items()
                if process.role == _WORKER
            },
            routers=tuple(sorted(name for name, process in local.items() if process.role == _ROUTER)),
            control=tuple(name for name in (CONTROLLER, GCS) if name in pids),
            hosts=tuple(
                sorted({process.node for process in topology.processes if process.role == _WORKER} - here)
            ),
        ),
    )


def _is_here(process: control_pb2.Process) -> bool:
    """Whether the process with this id is the one that is meant: ids are those of the process's own host."""
    try:
        return any(f"moesaic-{process.name}" in word for word in psutil.Process(process.pid).cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _find_gcs(pid: int) -> int | None:
    """Ray's head process, if it runs in the session in which one of its actors does."""
    session = os.getsid(pid)
    for process in psutil.process_iter(["name"]):
        try:
            is_gcs = process.info["name"] == _GCS_PROGRAM and os.getsid(process.pid) == session
            if is_gcs and process.status() != psutil.STATUS_ZOMBIE:
                return process.pid
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return None


def check_targets(living: Living, *, wants_gcs: bool) -> None:
    """Raises FailedPrecondition where a drill could reach nobody."""
    if not living.pids:
        raise FailedPrecondition(
            "grpc: none of the cluster's processes is on this host: run the drill where they are",
            field="grpc",
        )
    if wants_gcs and GCS not in living.pids:
        raise FailedPrecondition("fault: Ray's head does not run on this host", field="fault")
