"""A router over two workers that hold the same: they share the work, and no table takes away a worker that answers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.checkpoints import write_mixtral
from support.expert_calls import ReferenceExperts
from support.local_router import router_config
from support.processes import Process, running_workers

from moesaic import ExpertPolicy, rpc
from moesaic.client.client import Client
from moesaic.client.router_stats import WorkerTraffic
from moesaic.errors import MoesaicError
from moesaic.routing_table import Replica, RoutingTable, Snapshot
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.control.cluster_watch import NamedWorkers
from router.server import HEALTH_PERIOD_S, RouterServer

WAIT_S = 60.0
PROMPT = [90, 91, 92, 17]


@dataclass
class Controller:
    """A view of the cluster that says what the test puts into it."""

    snapshots: asyncio.Queue[Snapshot] = field(default_factory=asyncio.Queue)
    control_address: str = ""

    async def watch(self) -> AsyncIterator[Snapshot]:
        while True:
            yield await self.snapshots.get()


@dataclass
class Site:
    server: RouterServer
    client: Client
    controller: Controller
    # What the router began with.
    snapshot: Snapshot
    workers: list[Process]
    health: health_pb2_grpc.HealthStub

    async def tokens(self) -> list[int]:
        answer = await self.client.complete(PROMPT, max_tokens=32, temperature=0, timeout_s=WAIT_S)
        return list(answer.token_ids)

    async def publish(self, revision: int, *replicas: Replica) -> None:
        """Returns when the router has taken the table."""
        epoch = self.snapshot.epoch if replicas else None
        self.controller.snapshots.put_nowait(Snapshot(epoch, RoutingTable(revision, replicas)))
        while not self.controller.snapshots.empty():
            await asyncio.sleep(0)

    async def is_healthy(self) -> bool:
        """After the router has had the time to change its mind."""
        await asyncio.sleep(2 * HEALTH_PERIOD_S)
        request = health_pb2.HealthCheckRequest(service=rpc.INFERENCE_SERVICE)
        answer = await self.health.Check(request, timeout=WAIT_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def traffic(self, worker: int) -> WorkerTraffic:
        """What the router says of a worker."""
        address = self.workers[worker].address
        stats = await self.client.router_stats()
        return next(traffic for traffic in stats.workers if traffic.address == address)

    def rows(self) -> list[int]:
        """How many rows each worker computed."""
        counts = []
        for worker in self.workers:
            with rpc.channel(worker.address) as channel:
                stub = expert_pb2_grpc.ExpertServiceStub(channel)
                counts.append(stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest(), timeout=WAIT_S).rows)
        return counts


@asynccontextmanager
async def serving(model: Path, num_workers: int) -> AsyncIterator[Site]:
    """A router over workers of one name, each of which holds every expert."""
    switch_interval = sys.getswitchinterval()
    with running_workers(model, ["all"] * num_workers, "--name", "worker-0") as workers:
        experts = ReferenceExperts(model).model.addresses
        named = NamedWorkers([worker.address for worker in workers], model=model.name, experts=experts)
        async with asyncio.timeout(WAIT_S):
            snapshot = await anext(watched := named.watch())
            await watched.aclose()
        controller = Controller()
        controller.snapshots.put_nowait(snapshot)
        server = RouterServer(router_config(model, "auto"), controller)
        address = await server.start()
        try:
            await server.load()
            await server.wait_ready(WAIT_S)
            async with Client(address, retries=False) as client, rpc.aio_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                yield Site(server, client, controller, snapshot, workers, health)
        finally:
            await server.stop(0)
            sys.setswitchinterval(switch_interval)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "tiny")


async def test_both_replicas_compute_and_the_tokens_are_those_of_one(model: Path) -> None:
    async with serving(model, 1) as alone:
        expected = await alone.tokens()
    async with serving(model, 2) as site:
        assert await site.tokens() == expected
        first, second = site.rows()
        assert min(first, second) > 0.25 * (first + second)


async def test_a_replica_of_the_same_name_takes_over_from_one_that_is_killed(model: Path) -> None:
    async with serving(model, 2) as site:
        expected = await site.tokens()
        answering = asyncio.create_task(site.tokens())
        site.workers[0].kill()
        assert await answering == await site.tokens() == expected


async def test_a_table_without_workers_loses_nothing_while_they_answer(model: Path) -> None:
    async with serving(model, 2) as site:
        expected = await site.tokens()
        await site.publish(10)
        assert await site.tokens() == expected and await site.is_healthy()
        site.workers[0].kill()
        assert await site.tokens() == expected and await site.is_healthy()
        await site.publish(11, site.snapshot.table.replicas[1])
        assert await site.tokens() == expected and await site.is_healthy()


async def test_without_a_worker_that_answers_the_router_is_not_healthy(model: Path) -> None:
    async with serving(model, 1) as site:
        await site.publish(10)
        assert await site.is_healthy()
        site.workers[0].kill()
        async with asyncio.timeout(WAIT_S):
            while await site.is_healthy():
                pass
        with pytest.raises(MoesaicError) as caught:
            await site.client.complete(PROMPT, max_tokens=32, experts=ExpertPolicy(on_missing="fail"))
        assert caught.value.reason == "NO_REPLICA"


async def test_a_replica_that_stands_still_is_left_out_until_it_goes_on(model: Path) -> None:
    async with serving(model, 2) as site:
        expected = [await site.tokens() for _ in range(4)][-1]
        answering = [asyncio.create_task(site.tokens()) for _ in range(4)]
        await asyncio.to_thread(site.workers[0].stand_still)
        started_s = asyncio.get_running_loop().time()
        assert await asyncio.gather(*answering) == [expected] * 4
        assert await site.tokens() == expected
        # Half of engine.call_timeout_s is what it would cost to wait for it.
        assert asyncio.get_running_loop().time() - started_s < 10.0
        frozen = await site.traffic(0)
        assert frozen.circuit != "closed"
        assert await site.tokens() == expected
        assert (await site.traffic(0)).calls == frozen.calls, "it was called while its circuit was open"
        site.workers[0].go_on()
        async with asyncio.timeout(WAIT_S):
            while (await site.traffic(0)).calls == frozen.calls:
                assert await site.tokens() == expected


async def test_replicas_that_are_idle_are_found_dead_by_the_heartbeat(model: Path) -> None:
    async with serving(model, 2) as site:
        await site.tokens()
        site.workers[0].kill()
        async with asyncio.timeout(WAIT_S):
            while (await site.traffic(0)).circuit not in ("open", "half-open"):
                await asyncio.sleep(0.05)
        assert (await site.traffic(1)).circuit == "closed"
