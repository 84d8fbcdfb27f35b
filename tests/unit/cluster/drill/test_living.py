"""Who may be hit, from what the controller says and what runs on this host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import cast

import pytest

from cluster.drill.child import Child
from cluster.drill.living import Cluster, successors
from cluster.drill.site import POISONED, Site
from cluster.observation.observer import Observation, Observer
from moesaic.errors import Unavailable
from moesaic.v1 import control_pb2, inference_pb2

READY, PENDING = control_pb2.PROCESS_STATE_READY, control_pb2.PROCESS_STATE_PENDING
WORKER, ROUTER = control_pb2.PROCESS_ROLE_EXPERT_WORKER, control_pb2.PROCESS_ROLE_ROUTER
SITE = Site("http://h:1", "h:2", "m")


class FakeObserver:
    def __init__(self, seen: Observation | None) -> None:
        self._seen = seen

    async def observe_routers(self) -> Observation:
        if self._seen is None:
            raise Unavailable("no router answers")
        return self._seen


@pytest.fixture
def pid() -> Iterator[int]:
    """A process with the title of a worker, as Ray gives it."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", "ray::moesaic-w0.report"]
    with subprocess.Popen(command) as process:
        yield process.pid
        process.kill()


def observed(*processes: control_pb2.Process, **entry: object) -> FakeObserver:
    topology = control_pb2.GetTopologyResponse(processes=processes) if processes else None
    stats = inference_pb2.GetRouterStatsResponse(**entry)  # type: ignore[arg-type]
    return FakeObserver(Observation(0.0, inference_pb2.GetModelInfoResponse(), (), {}, {}, stats, topology))


def cluster(observer: FakeObserver, site: Site = SITE) -> Cluster:
    return Cluster(site, cast(Observer, observer))


def process(
    name: str, pid: int, role: control_pb2.ProcessRole, node: str, **fields: object
) -> control_pb2.Process:
    return control_pb2.Process(name=name, pid=pid, role=role, node=node, **({"state": READY} | fields))  # type: ignore[arg-type]


async def test_only_processes_of_this_host_can_be_hit_and_the_others_hosts_can_be_cut_off(pid: int) -> None:
    expert = control_pb2.GetTopologyResponse().processes.add().experts.add()
    expert.layer, expert.slot = 1, 2
    seen = observed(
        process("w0", pid, WORKER, "10.0.0.1", experts=[expert]),
        process("w1", pid, WORKER, "10.0.0.2"),
        process("router-0", pid, ROUTER, "10.0.0.2"),
    )
    found = await cluster(seen).look()
    assert found is not None
    assert found.pids == {"w0": pid}
    assert found.targets.workers == {"w0": frozenset({(1, 2)})}
    assert found.targets.routers == ()
    assert found.targets.hosts == ("10.0.0.2",)


async def test_a_cluster_is_not_whole_while_a_process_is_not_ready_or_nobody_answers(pid: int) -> None:
    assert await cluster(observed(process("w0", pid, WORKER, "h", state=PENDING))).look() is None
    assert await cluster(observed()).look() is None
    assert await cluster(FakeObserver(None)).look() is None


async def test_by_hand_a_cluster_is_whole_while_all_workers_are_connected() -> None:
    child = cast(Child, type("Running", (), {"pid": 7, "has_ended": False})())
    site = Site("http://h:1", "h:2", "m", by_hand={POISONED: child})
    connected = inference_pb2.WorkerTraffic(worker=POISONED, connected=True)
    found = await cluster(observed(workers=[connected]), site).look()
    assert found is not None
    assert (found.pids, found.targets.poisonable) == ({POISONED: 7}, (POISONED,))
    assert await cluster(observed(workers=[]), site).look() is None
    assert await cluster(observed(workers=[connected], experts_without_worker=1), site).look() is None


def test_who_comes_in_the_place_of_a_process_is_found_by_name_and_session(pid: int) -> None:
    find = successors({"w0": pid})
    assert find() == [pid]
    assert successors({"w1": pid})() == []
