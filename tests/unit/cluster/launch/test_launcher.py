"""The launcher against processes that are only played: when it is ready, why it gives up, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.control.process_report import CANNOT_START, ProcessReport
from cluster.launch.launcher import Endpoints, Launcher
from cluster.processes.process_plan import PlannedProcess
from moesaic import rpc
from moesaic.errors import FailedPrecondition, Unavailable
from moesaic.settings import Settings, load_settings
from moesaic.v1 import control_pb2 as pb
from moesaic.v1 import control_pb2_grpc

NAMES = ("router-0", "router-1", "controller", "expert-worker-0", "gateway")
READY = {
    "router-0": "127.0.0.1:2",
    "router-1": "127.0.0.1:5",
    "controller": "127.0.0.1:3",
    "expert-worker-0": "127.0.0.1:4",
    "gateway": "127.0.0.1:1",
}


@dataclass
class PlayedStarter:
    """Ray, as far as a launcher can tell; `topologies` are shown one after the other, the last for ever."""

    topologies: list[pb.GetTopologyResponse]
    address_: str = ""
    taken: tuple[str, ...] = ()
    started: list[str] = field(default_factory=list)
    stopped: list[tuple[str, float]] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    slow_to_stop: asyncio.Event | None = None
    silent: dict[str, Unavailable] = field(default_factory=dict)

    @property
    def peers(self) -> PlayedStarter:
        return self

    def names(self) -> tuple[str, ...]:
        return self.taken

    def start(self, process: PlannedProcess) -> None:
        self.started.append(process.spec.name)

    async def kill(self, names: Iterable[str]) -> None:
        self.killed += names

    async def report(self, name: str, seen: int, hold_s: float) -> ProcessReport:
        if name in self.silent:
            raise self.silent[name]
        return ProcessReport(name, 1, pb.PROCESS_STATE_LOADING, "", "n", 1, 0)

    async def address(self, name: str) -> str:
        if not self.address_:
            raise Unavailable("controller is not there")
        return self.address_ if name == "controller" else READY[name]

    async def stop(self, name: str, drain_s: float) -> None:
        self.stopped.append((name, drain_s))
        if self.slow_to_stop is not None:
            await self.slow_to_stop.wait()
        if name == "expert-worker-0":
            raise Unavailable("its process died")


class PlayedControl(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, starter: PlayedStarter) -> None:
        self.starter = starter

    async def GetTopology(self, request: object, context: object) -> pb.GetTopologyResponse:
        topologies = self.starter.topologies
        return topologies.pop(0) if len(topologies) > 1 else topologies[0]


class Patience:
    """The time that a start may take, which is over once something was shown."""

    def __call__(self, timeout_s: float) -> asyncio.Timeout:
        self.limit = asyncio.timeout(None)
        return self.limit

    def end(self, shown: pb.GetTopologyResponse) -> None:
        self.limit.reschedule(0.0)


@asynccontextmanager
async def launched(
    *topologies: pb.GetTopologyResponse, time_limit: Callable[[float], asyncio.Timeout] = asyncio.timeout
) -> AsyncIterator[tuple[Launcher, PlayedStarter]]:
    starter = PlayedStarter(list(topologies))
    server = rpc.Server(
        {
            rpc.CONTROL_SERVICE: lambda server: control_pb2_grpc.add_ControlServiceServicer_to_server(
                PlayedControl(starter), server
            )
        }
    )
    starter.address_ = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    launcher = Launcher(starter, planned(), settings(60.0), time_limit=time_limit)
    launcher.submit()
    try:
        yield launcher, starter
    finally:
        await server.stop(0)


def planned() -> list[PlannedProcess]:
    return [cast(PlannedProcess, SimpleNamespace(spec=SimpleNamespace(name=name))) for name in NAMES]


def settings(timeout_s: float) -> Settings:
    return load_settings(cluster={"start_timeout_s": timeout_s, "drain_timeout_s": 3.0, "routers": 2})


def topology(**changes: dict[str, Any]) -> pb.GetTopologyResponse:
    """All ready, but for `changes` by process name (underscores for hyphens)."""
    processes = []
    for name, address in READY.items():
        values = {"state": pb.PROCESS_STATE_READY, "address": address} | changes.get(
            name.replace("-", "_"), {}
        )
        processes.append(pb.Process(name=name, **values))
    return pb.GetTopologyResponse(processes=processes)


def show(topology: pb.GetTopologyResponse) -> None:
    pass


async def test_all_processes_are_asked_for_at_once() -> None:
    async with launched(topology()) as (_, starter):
        assert tuple(starter.started) == NAMES


async def test_it_is_ready_when_all_processes_are_and_shows_what_it_sees_meanwhile() -> None:
    loading = topology(router_1={"state": pb.PROCESS_STATE_LOADING})
    seen: list[pb.GetTopologyResponse] = []
    async with launched(loading, loading, topology()) as (launcher, _):
        assert await launcher.wait_ready(seen.append) == Endpoints(http="127.0.0.1:1", grpc="127.0.0.1:2")
    assert seen == [loading, loading, topology()]


async def test_a_process_that_failed_ends_the_wait_with_its_reason() -> None:
    failed = topology(expert_worker_0={"state": pb.PROCESS_STATE_FAILED, "detail": "no memory"})
    async with launched(failed) as (launcher, _):
        with pytest.raises(Unavailable, match=r"^expert-worker-0: no memory$"):
            await launcher.wait_ready(show)


async def test_a_process_that_keeps_dying_ends_the_wait() -> None:
    dying = topology(router_0={"state": pb.PROCESS_STATE_PENDING, "restarts": 3})
    async with launched(dying) as (launcher, _):
        with pytest.raises(Unavailable, match="router-0: its process died 3 times while it started"):
            await launcher.wait_ready(show)


async def test_too_long_a_start_says_who_is_missing() -> None:
    patience = Patience()
    waiting = topology(expert_worker_0={"state": pb.PROCESS_STATE_PENDING, "detail": "no GPU is free"})
    async with launched(waiting, time_limit=patience) as (launcher, _):
        with pytest.raises(Unavailable, match=r"expert-worker-0 is PENDING \(no GPU is free\)"):
            await launcher.wait_ready(patience.end)


async def test_a_process_that_failed_is_named_with_its_node_where_there_are_several() -> None:
    failed = topology(
        router_0={"node": "10.0.0.1"},
        expert_worker_0={"state": pb.PROCESS_STATE_FAILED, "detail": "no memory", "node": "10.0.0.2"},
    )
    async with launched(failed) as (launcher, _):
        with pytest.raises(Unavailable, match=r"^expert-worker-0 on node 10\.0\.0\.2: no memory$"):
            await launcher.wait_ready(show)


async def test_too_long_a_start_names_the_process_that_the_others_wait_for() -> None:
    patience = Patience()
    waiting = topology(
        gateway={"state": pb.PROCESS_STATE_LOADING, "role": pb.PROCESS_ROLE_GATEWAY},
        router_0={"state": pb.PROCESS_STATE_LOADING, "role": pb.PROCESS_ROLE_ROUTER},
        expert_worker_0={"state": pb.PROCESS_STATE_PENDING, "role": pb.PROCESS_ROLE_EXPERT_WORKER},
    )
    async with launched(waiting, time_limit=patience) as (launcher, _):
        with pytest.raises(Unavailable, match="expert-worker-0 is PENDING"):
            await launcher.wait_ready(patience.end)


@pytest.mark.parametrize("name", ["controller", "expert-worker-0"])
async def test_a_process_that_cannot_be_started_ends_the_wait_although_the_controller_says_nothing(
    name: str,
) -> None:
    pending = topology(expert_worker_0={"state": pb.PROCESS_STATE_PENDING})
    async with launched(pending) as (launcher, starter):
        if name == "controller":
            starter.address_ = ""
        starter.silent[name] = Unavailable("cannot start on node n: no Moesaic", reason=CANNOT_START)
        with pytest.raises(Unavailable, match=f"^{name}: cannot start on node n: no Moesaic$"):
            await launcher.wait_ready(show)


async def test_a_controller_without_a_place_says_what_it_waits_for() -> None:
    patience = Patience()
    async with launched(topology(), time_limit=patience) as (launcher, starter):
        starter.address_ = ""
        starter.silent["controller"] = Unavailable("it waits for a place")
        with pytest.raises(Unavailable, match=r"the controller does not answer \(it waits for a place\)"):
            await launcher.wait_ready(patience.end)


async def test_a_controller_that_never_answers_is_what_it_was_waited_for() -> None:
    patience = Patience()
    async with launched(topology(), time_limit=patience) as (launcher, starter):
        starter.address_ = ""
        with pytest.raises(Unavailable, match="the controller does not answer"):
            await launcher.wait_ready(patience.end)


async def test_ending_drains_from_the_outside_in_and_kills_what_was_started() -> None:
    async with launched(topology()) as (launcher, starter):
        await launcher.wait_ready(show)
        await launcher.stop(asyncio.Event())
    assert starter.stopped[0] == ("gateway", 3.0)
    assert sorted(starter.stopped[1:3]) == [("router-0", 3.0), ("router-1", 3.0)]
    assert sorted(starter.stopped[3:]) == [("controller", 0.0), ("expert-worker-0", 0.0)]
    assert tuple(starter.killed) == NAMES


async def test_a_start_that_failed_is_not_drained() -> None:
    async with launched(topology(router_0={"state": pb.PROCESS_STATE_FAILED})) as (launcher, starter):
        with pytest.raises(Unavailable):
            await launcher.wait_ready(show)
        await launcher.stop(asyncio.Event())
    assert (starter.stopped, tuple(starter.killed)) == ([], NAMES)


async def test_force_cuts_the_drain_short() -> None:
    async with launched(topology()) as (launcher, starter):
        await launcher.wait_ready(show)
        starter.slow_to_stop, force = asyncio.Event(), asyncio.Event()
        stopping = asyncio.create_task(launcher.stop(force))
        await asyncio.sleep(0.01)
        assert not stopping.done()
        force.set()
        await asyncio.wait_for(stopping, 60)
    assert tuple(starter.killed) == NAMES


async def test_a_ray_that_serves_already_is_left_alone() -> None:
    starter = PlayedStarter([topology()], taken=("router-0",))
    launcher = Launcher(starter, planned(), settings(1.0))
    with pytest.raises(FailedPrecondition) as refused:
        launcher.submit()
    assert refused.value.field == "address"
    await launcher.stop(asyncio.Event())
    assert (starter.started, starter.killed) == ([], [])
