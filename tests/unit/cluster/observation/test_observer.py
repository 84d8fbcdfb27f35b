"""What is seen of a cluster whose processes answer, are away, or are still loading."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
import pytest_asyncio
from support.played_cluster import PlayedController, PlayedRouter, PlayedWorker, playing

from cluster.observation import observer as observer_module
from cluster.observation.observer import ObservedProcess, Observer
from moesaic import rpc
from moesaic.errors import MoesaicError, Unavailable
from moesaic.v1 import control_pb2, expert_pb2, inference_pb2

READY = control_pb2.PROCESS_STATE_READY


@dataclass
class Rig:
    """Two routers, a controller that knows them, a worker that answers and one that does not."""

    routers: tuple[PlayedRouter, PlayedRouter]
    worker: PlayedWorker
    controller: PlayedController
    addresses: dict[str, str]
    servers: dict[str, rpc.Server]


@pytest_asyncio.fixture
async def rig(closed_address: str) -> AsyncIterator[Rig]:
    routers = (
        PlayedRouter(inference_pb2.GetRouterStatsResponse(steps=1)),
        PlayedRouter(inference_pb2.GetRouterStatsResponse(steps=2)),
    )
    worker, controller = PlayedWorker(expert_pb2.GetWorkerStatsResponse(rows=3)), PlayedController()
    played = {
        "router-0": routers[0],
        "router-1": routers[1],
        "expert-worker-0": worker,
        "controller": controller,
    }
    addresses, servers = {}, {}
    async with AsyncExitStack() as stack:
        for name, servicer in played.items():
            addresses[name], servers[name] = await stack.enter_async_context(playing(servicer))
        addresses["expert-worker-1"] = closed_address
        for name, address in addresses.items():
            role = (
                control_pb2.PROCESS_ROLE_ROUTER
                if name.startswith("router")
                else control_pb2.PROCESS_ROLE_CONTROLLER
                if name == "controller"
                else control_pb2.PROCESS_ROLE_EXPERT_WORKER
            )
            controller.topology.processes.add(name=name, role=role, state=READY, address=address)
        for router in routers:
            router.control_address = addresses["controller"]
        yield Rig(routers, worker, controller, addresses, servers)


async def test_a_cluster_is_seen_whole_and_a_process_that_is_away_has_no_counters(rig: Rig) -> None:
    async with Observer(rig.addresses["router-0"], clock=lambda: 7.0) as observer:
        seen = await observer.observe()
    assert (seen.at_s, seen.model.model, seen.problem) == (7.0, "tiny", "")
    assert seen.processes == (
        ObservedProcess("router-0", rig.addresses["router-0"], True, READY),
        ObservedProcess("router-1", rig.addresses["router-1"], True, READY),
        ObservedProcess("expert-worker-0", rig.addresses["expert-worker-0"], False, READY),
        ObservedProcess("expert-worker-1", rig.addresses["expert-worker-1"], False, READY),
    )
    assert {name: stats.steps for name, stats in seen.routers.items()} == {"router-0": 1, "router-1": 2}
    assert {name: stats.rows for name, stats in seen.workers.items()} == {"expert-worker-0": 3}
    assert seen.topology == rig.controller.topology


async def test_the_entry_is_the_router_that_was_asked(rig: Rig) -> None:
    async with Observer(rig.addresses["router-1"]) as observer:
        assert (await observer.observe()).entry.steps == 2


async def test_routers_can_be_observed_without_asking_a_worker(rig: Rig) -> None:
    async with Observer(rig.addresses["router-0"]) as observer:
        seen = await observer.observe_routers()
    assert (len(seen.processes), len(seen.routers), seen.workers) == (4, 2, {})
    assert rig.worker.times_asked == 0


async def test_without_its_controller_a_router_and_the_workers_that_it_names_are_seen(rig: Rig) -> None:
    rig.routers[0].stats.workers.add(worker="w", address=rig.addresses["expert-worker-0"])
    await rig.servers["controller"].stop(0)
    async with Observer(rig.addresses["router-0"]) as observer:
        seen = await observer.observe()
    assert [(process.name, process.is_router) for process in seen.processes] == [
        ("router", True),
        ("w", False),
    ]
    assert (seen.topology, seen.workers["w"].rows) == (None, 3)
    assert (
        seen.problem
        == f"the controller at {rig.addresses['controller']} does not answer, and serving goes on"
    )


async def test_a_silent_controller_is_not_waited_for(
    rig: Rig, silent_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer_module, "CONTROLLER_TIMEOUT_S", 0.1)
    rig.routers[0].control_address = silent_address
    async with Observer(rig.addresses["router-0"], timeout_s=3600.0) as observer:
        seen = await observer.observe_routers()
    assert (seen.topology, seen.entry.steps) == (None, 1)
    assert seen.problem == f"the controller at {silent_address} does not answer, and serving goes on"


async def test_workers_that_were_given_one_name_are_told_apart_by_their_addresses(rig: Rig) -> None:
    others = [rig.addresses["expert-worker-0"], rig.addresses["expert-worker-1"]]
    for address in others:
        rig.routers[0].stats.workers.add(worker="w", address=address)
    rig.routers[0].control_address = ""
    async with Observer(rig.addresses["router-0"]) as observer:
        seen = await observer.observe()
    workers = [(process.name, process.address) for process in seen.processes if not process.is_router]
    assert workers == [(f"w {address}", address) for address in others]
    assert seen.workers[f"w {others[0]}"].rows == 3


async def test_another_router_answers_for_the_target_once_it_is_known(rig: Rig) -> None:
    async with Observer(rig.addresses["router-0"]) as observer:
        await observer.observe()
        await rig.servers["router-0"].stop(0)
        seen = await observer.observe()
    assert (seen.entry.steps, list(seen.routers)) == (2, ["router-1"])


async def test_when_no_router_is_left_the_target_is_the_one_that_is_named(rig: Rig) -> None:
    async with Observer(rig.addresses["router-0"]) as observer:
        await observer.observe()
        await rig.servers["router-0"].stop(0)
        await rig.servers["router-1"].stop(0)
        with pytest.raises(Unavailable, match=f"no router answers at {rig.addresses['router-0']}: "):
            await observer.observe()


async def test_a_router_that_refuses_speaks_for_itself(rig: Rig) -> None:
    rig.routers[0].error = Unavailable("the router is loading", reason="LOADING")
    async with Observer(rig.addresses["router-0"]) as observer:
        with pytest.raises(MoesaicError) as refused:
            await observer.observe()
    assert (refused.value.message, refused.value.reason) == ("the router is loading", "LOADING")
