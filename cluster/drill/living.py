"""The processes of a cluster under drill: who they are now, and whether all of them are well."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from cluster.drill.faults import Targets
from cluster.drill.session import is_alive, members
from cluster.drill.site import POISONED, Site
from cluster.observation.observer import Observation, Observer
from cluster.processes.specs import CONTROLLER
from moesaic.errors import MoesaicError
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
        self._here = LocalProcesses()

    async def look(self) -> Living | None:
        """The processes if all are READY, else None."""
        try:
            seen = await self.observer.observe_routers()
        except MoesaicError:
            return None
        if self.site.by_hand:
            return self._by_hand(seen)
        return await asyncio.to_thread(self._of_topology, seen.topology)  # tokens arrive meanwhile

    def _by_hand(self, seen: Observation) -> Living | None:
        """Without a controller: well while every expert has a worker and all of them are connected."""
        workers = {traffic.worker for traffic in seen.entry.workers if traffic.connected}
        if seen.entry.experts_without_worker or not workers.issuperset(self.site.by_hand):
            return None
        targets = Targets({}, poisonable=(POISONED,) if POISONED in self.site.by_hand else ())
        return Living({name: child.pid for name, child in self.site.by_hand.items()}, targets)

    def _of_topology(self, topology: control_pb2.GetTopologyResponse | None) -> Living | None:
        if topology is None or not topology.processes:
            return None
        if any(process.state != control_pb2.PROCESS_STATE_READY for process in topology.processes):
            return None
        local = [process for process in topology.processes if self._here.has(process.name, process.pid)]
        pids = {process.name: process.pid for process in local}
        if CONTROLLER in pids and (gcs := self._here.find_gcs(pids[CONTROLLER])) is not None:
            pids[GCS] = gcs
        workers = [process for process in topology.processes if process.role == _WORKER]
        here = {process.node for process in local}
        return Living(
            pids,
            Targets(
                workers={process.name: _experts(process) for process in workers if process.name in pids},
                routers=tuple(sorted(process.name for process in local if process.role == _ROUTER)),
                control=tuple(name for name in (CONTROLLER, GCS) if name in pids),
                hosts=tuple(sorted({process.node for process in workers} - here)),
            ),
        )


class LocalProcesses:
    """Processes of this host. What was found is kept: looking takes time from the load, which shares this process."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], bool] = {}
        self._gcs: psutil.Process | None = None

    def has(self, name: str, pid: int) -> bool:
        """Whether the process with this id is the one that is meant: ids are those of the process's own host."""
        if (name, pid) not in self._known:
            self._known[name, pid] = _is_named(name, pid)
        return self._known[name, pid]

    def find_gcs(self, pid: int) -> int | None:
        """Ray's head process, if it runs in the session in which the process does."""
        if self._gcs is None or not is_alive(self._gcs):
            self._gcs = _find_gcs(os.getsid(pid))
        return None if self._gcs is None else self._gcs.pid


def successors(pids: Mapping[str, int]) -> Callable[[], list[int]]:
    """Finds, each time that it is called, the processes that have these names in the sessions of the given ones."""
    sessions = {name: os.getsid(pid) for name, pid in pids.items()}
    return lambda: [pid for name, session in sessions.items() for pid in _find(name, session)]


def _find(name: str, session: int) -> list[int]:
    if name == GCS:
        gcs = _find_gcs(session)
        return [] if gcs is None else [gcs.pid]
    return [process.pid for process in members(session) if _is_named(name, process.pid)]


def _experts(process: control_pb2.Process) -> frozenset[tuple[int, int]]:
    return frozenset((expert.layer, expert.slot) for expert in process.experts)


def _is_named(name: str, pid: int) -> bool:
    """Ray gives the process of an actor a title."""
    try:
        return any(f"moesaic-{name}" in word for word in psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _find_gcs(session: int) -> psutil.Process | None:
    for process in members(session):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == _GCS_PROGRAM:
                return process
    return None
