"""A router that follows a controller: every snapshot arrives, a controller that comes back elsewhere is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from support.fake_links import make_epoch

from moesaic import rpc
from moesaic.epoch import Epoch, ExpertVersion, versions_to_proto
from moesaic.errors import Unavailable
from moesaic.routing_table import Replica, RoutingTable, Snapshot
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc
from router.control.cluster_watch import ControlWatch, NamedWorkers

EPOCH = make_epoch(1, 2)
WAIT_S = 60.0


class Controller(control_pb2_grpc.ControlServiceServicer):
    """Sends what is put into its queue."""

    def __init__(self) -> None:
        self.snapshots: asyncio.Queue[control_pb2.WatchResponse] = asyncio.Queue()

    async def Watch(
        self, request: control_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[control_pb2.WatchResponse]:
        while True:
            yield await self.snapshots.get()


def snapshot(revision: int, *, complete: bool = True) -> control_pb2.WatchResponse:
    table = RoutingTable(revision, (Replica("a", "a:1", f"a-{revision}", EPOCH.expert_versions),))
    return control_pb2.WatchResponse(
        epoch=EPOCH.to_proto() if complete else None, routing_table=table.to_proto()
    )


@asynccontextmanager
async def serving(controller: Controller) -> AsyncIterator[str]:
    server = rpc.Server(
        {
            "moesaic.v1.ControlService": lambda grpc_server: (
                control_pb2_grpc.add_ControlServiceServicer_to_server(controller, grpc_server)
            )
        }
    )
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def following(snapshots: AsyncIterator[Snapshot]) -> Snapshot:
    async with asyncio.timeout(WAIT_S):
        return await anext(snapshots)


async def test_every_snapshot_arrives_whole_and_in_order() -> None:
    controller = Controller()
    async with serving(controller) as address:

        async def resolve() -> str:
            return address

        watched = ControlWatch(resolve).watch()
        for message in (snapshot(1, complete=False), snapshot(2)):
            controller.snapshots.put_nowait(message)
        first, second = await following(watched), await following(watched)
        await watched.aclose()
    assert first.epoch is None and first.table.revision == 1
    assert second.epoch == EPOCH and second.table.replicas[0].incarnation == "a-2"


async def test_a_controller_that_comes_back_elsewhere_is_found_again() -> None:
    addresses: list[str] = []

    async def resolve() -> str:
        if not addresses:
            raise Unavailable("nobody knows yet")
        return addresses[-1]

    view = ControlWatch(resolve)
    watched = view.watch()
    waiting = asyncio.create_task(following(watched))
    first, second = Controller(), Controller()
    async with serving(first) as address:
        addresses.append(address)
        first.snapshots.put_nowait(snapshot(1))
        assert (await waiting).table.revision == 1
    waiting = asyncio.create_task(following(watched))
    async with serving(second) as address:
        addresses.append(address)
        second.snapshots.put_nowait(snapshot(2))
        assert (await waiting).table.revision == 2
        assert view.control_address == address
        await watched.aclose()


async def test_without_experts_there_is_an_epoch_without_workers() -> None:
    watched = NamedWorkers([], model="dense", experts=()).watch()
    first = await following(watched)
    await watched.aclose()
    assert first == Snapshot(Epoch.of("dense", {}), RoutingTable(1, ()))


class Worker(expert_pb2_grpc.ExpertServiceServicer):
    """Holds what the test says."""

    def __init__(self, holdings: frozenset[ExpertVersion]) -> None:
        self.holdings = holdings

    async def Describe(self, request: object, context: object) -> expert_pb2.DescribeResponse:
        return expert_pb2.DescribeResponse(
            worker="a", incarnation="a-1", experts=versions_to_proto(self.holdings)
        )


@asynccontextmanager
async def describing(worker: Worker) -> AsyncIterator[str]:
    server = rpc.Server(
        {
            "moesaic.v1.ExpertService": lambda grpc_server: (
                expert_pb2_grpc.add_ExpertServiceServicer_to_server(worker, grpc_server)
            )
        }
    )
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    try:
        yield address
    finally:
        await server.stop(0)


async def test_what_a_running_named_worker_loads_is_in_the_next_snapshot() -> None:
    worker = Worker(EPOCH.expert_versions)
    async with describing(worker) as address:
        watched = NamedWorkers([address], model="tiny", experts=EPOCH.versions).watch()
        first = await following(watched)
        worker.holdings |= {ExpertVersion(min(EPOCH.versions), b"2" * 32)}
        second = await following(watched)
        await watched.aclose()
    assert [replica.holdings for replica in first.table.replicas] == [EPOCH.expert_versions]
    assert second.table.revision > first.table.revision
    assert second.table.replicas == (Replica("a", address, "a-1", worker.holdings),)


async def test_a_named_worker_that_describes_itself_wrongly_is_not_there_until_it_is_right() -> None:
    worker = Worker(frozenset({ExpertVersion(min(EPOCH.versions), b"short")}))
    async with describing(worker) as address:
        watched = NamedWorkers([address], model="tiny", experts=EPOCH.versions).watch()
        assert (await following(watched)).table.replicas == ()
        worker.holdings = EPOCH.expert_versions
        assert (await following(watched)).epoch == EPOCH
        await watched.aclose()


async def test_named_workers_that_are_away_make_no_epoch(closed_address: str) -> None:
    watched = NamedWorkers([closed_address], model="tiny", experts=EPOCH.versions).watch()
    first = await following(watched)
    await watched.aclose()
    assert first == Snapshot(None, RoutingTable(1, ()))
