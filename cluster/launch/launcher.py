"""Starts the planned processes, waits until the cluster answers, and ends them again.

All processes are started at the same time and then observed through the controller, as `moesaic status` does.
Until a process runs it is asked for itself as well: the controller cannot say why it does not run itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.control.peers import Peers
from cluster.control.process_report import CANNOT_START
from cluster.observation.observer import ask_topology
from cluster.processes.process_plan import PlannedProcess
from cluster.processes.specs import CONTROLLER, GATEWAY, router_names
from moesaic import rpc
from moesaic.errors import FailedPrecondition, MoesaicError, Unavailable
from moesaic.settings import Settings
from moesaic.v1 import control_pb2

log = logging.getLogger(__name__)

POLL_S = 0.15
ASK_TIMEOUT_S = 5.0
# A process that has died this often before the cluster is ready is not expected to start at all.
MAX_START_RESTARTS = 3

# Which roles are waited for first: a router serves once all experts have a worker, a gateway once a router does.
_WAITED_FOR = {
    control_pb2.PROCESS_ROLE_EXPERT_WORKER: 1,
    control_pb2.PROCESS_ROLE_CONTROLLER: 2,
    control_pb2.PROCESS_ROLE_ROUTER: 3,
    control_pb2.PROCESS_ROLE_GATEWAY: 4,
}

Topology = control_pb2.GetTopologyResponse


class StoppablePeers(Peers, Protocol):
    """Peers that can be stopped."""

    async def stop(self, name: str, drain_s: float) -> None:
        """Returns when the process has drained. Raises Unavailable."""
        ...


class ProcessStarter(Protocol):
    """What the launcher needs of Ray."""

    @property
    def peers(self) -> StoppablePeers: ...

    def names(self) -> tuple[str, ...]: ...

    def start(self, process: PlannedProcess) -> None: ...

    async def kill(self, names: Iterable[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The addresses of a cluster, as HOST:PORT. `grpc` is that of the first router."""

    http: str
    grpc: str


class Launcher:
    """Starts and ends the processes of one cluster."""

    def __init__(
        self,
        starter: ProcessStarter,
        processes: Sequence[PlannedProcess],
        settings: Settings,
        *,
        time_limit: Callable[[float], asyncio.Timeout] = asyncio.timeout,
    ) -> None:
        self._time_limit = time_limit
        self._starter = starter
        self._processes = processes
        self._settings = settings
        self._routers = router_names(settings.cluster.routers)
        self._names: list[str] = []
        # Why processes of which nothing was heard yet do not answer.
        self._silent: dict[str, str] = {}
        self._ready = False

    def submit(self) -> None:
        """Starts all processes without waiting. Raises FailedPrecondition when this Ray serves a model."""
        if self._starter.names():
            raise FailedPrecondition(
                "address: Moesaic serves on this Ray already; `moesaic stop` ends that", field="address"
            )
        for process in self._processes:
            self._starter.start(process)
            self._names.append(process.spec.name)

    async def wait_ready(self, show: Callable[[Topology], None]) -> Endpoints:
        """Returns when a real token has passed every layer and the gateway listens; shows states until then.

        Raises Unavailable as soon as a process has failed, or after `cluster.start_timeout_s`.
        """
        timeout_s = self._settings.cluster.start_timeout_s
        topology = Topology()
        starts = [asyncio.create_task(self._watch_start(name)) for name in self._names]
        try:
            async with self._time_limit(timeout_s):
                while not (topology.processes and all(map(_ready, topology.processes))):
                    await asyncio.sleep(POLL_S)
                    topology = await self._look() or topology
                    show(topology)
                    _refuse_failed(topology)
                    for start in starts:
                        if start.done():
                            start.result()
                peers = self._starter.peers
                endpoints = Endpoints(
                    http=await peers.address(GATEWAY), grpc=await peers.address(self._routers[0])
                )
        except TimeoutError as error:
            raise Unavailable(
                f"not ready after {timeout_s:.0f} s: {_waiting_for(topology, self._silent)}"
            ) from error
        finally:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
        self._ready = True
        return endpoints

    async def stop(self, force: asyncio.Event) -> None:
        """Ends all processes, after running requests have ended or the drain is cut short by `force`."""
        if self._ready:
            drain = asyncio.create_task(self._drain(self._settings.cluster.drain_timeout_s))
            forced = asyncio.create_task(force.wait())
            await asyncio.wait({drain, forced}, return_when=asyncio.FIRST_COMPLETED)
            drain.cancel()
            forced.cancel()
        await self._starter.kill(self._names)

    async def _watch_start(self, name: str) -> None:
        """Returns when the process answers. Raises Unavailable once it is known that it cannot be started."""
        while True:
            try:
                await self._starter.peers.report(name, seen=0, hold_s=0.0)
            except MoesaicError as error:
                if error.reason == CANNOT_START:
                    raise Unavailable(f"{name}: {error.message}") from error
                self._silent[name] = error.message
            else:
                self._silent.pop(name, None)
                return
            await asyncio.sleep(POLL_S)

    async def _drain(self, drain_s: float) -> None:
        """From the outside in, so that no process loses another that it still calls."""
        await self._stop_process(GATEWAY, drain_s)
        await self._stop_all(self._routers, drain_s)
        await self._stop_all([name for name in self._names if name not in (GATEWAY, *self._routers)], 0.0)

    async def _stop_all(self, names: Iterable[str], drain_s: float) -> None:
        await asyncio.gather(*(self._stop_process(name, drain_s) for name in names))

    async def _stop_process(self, name: str, drain_s: float) -> None:
        try:
            await self._starter.peers.stop(name, drain_s)
        except Unavailable as error:
            log.warning("%s could not drain: %s", name, error.message)

    async def _look(self) -> Topology | None:
        """The topology as the controller sees it; None while it does not answer."""
        with contextlib.suppress(MoesaicError):
            address = await self._starter.peers.address(CONTROLLER)
            async with rpc.aio_channel(address) as channel:
                return await ask_topology(channel, ASK_TIMEOUT_S)
        return None


def _ready(process: control_pb2.Process) -> bool:
    return process.state == control_pb2.PROCESS_STATE_READY


def _refuse_failed(topology: Topology) -> None:
    for process in topology.processes:
        if process.state == control_pb2.PROCESS_STATE_FAILED:
            raise Unavailable(f"{_named(process, topology)}: {process.detail}")
        if process.restarts >= MAX_START_RESTARTS:
            raise Unavailable(
                f"{_named(process, topology)}: its process died {process.restarts} times while it started"
            )


def _waiting_for(topology: Topology, silent: Mapping[str, str]) -> str:
    """The process that holds the others up: routers wait for workers, the gateway waits for routers."""
    waiting = [process for process in topology.processes if not _ready(process)]
    if not waiting:
        reason = silent.get(CONTROLLER)
        return "the controller does not answer" + (f" ({reason})" if reason else "")
    first = min(waiting, key=lambda process: (_WAITED_FOR.get(process.role, 0), process.state))
    state = control_pb2.ProcessState.Name(first.state).removeprefix("PROCESS_STATE_")
    detail = first.detail or silent.get(first.name)
    return f"{_named(first, topology)} is {state}" + (f" ({detail})" if detail else "")


def _named(process: control_pb2.Process, topology: Topology) -> str:
    """The name of a process, with its node where there are several."""
    several = len({other.node for other in topology.processes if other.node}) > 1
    return f"{process.name} on node {process.node}" if several and process.node else process.name
