"""The controller's eyes on real health streams: a worker that is lost is lost at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from cluster.control.process_report import EVIDENCE, PROCESS_DIED, ProcessReport
from cluster.control.process_watch import ProcessWatch
from moesaic import rpc
from moesaic.epoch import ExpertAddress
from moesaic.errors import Unavailable
from moesaic.v1 import common_pb2, expert_pb2, expert_pb2_grpc
from moesaic.v1 import control_pb2 as pb


class PlayedWorker(expert_pb2_grpc.ExpertServiceServicer):
    """Describes itself, and is as healthy as its server says."""

    async def Describe(self, request: object, context: object) -> expert_pb2.DescribeResponse:
        version = common_pb2.ExpertVersion(
            address=common_pb2.ExpertAddress(layer=1, slot=2), digest=bytes(32)
        )
        return expert_pb2.DescribeResponse(worker="w0", incarnation="first", experts=[version])


@dataclass
class PlayedPeers:
    """Peers with one worker, whose report stays the same until the test changes it."""

    current: ProcessReport
    holds_s: list[float] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    silent: bool = False

    async def report(self, name: str, seen: int, hold_s: float) -> ProcessReport:
        self.holds_s.append(hold_s)
        if self.silent:
            raise Unavailable("it does not answer")
        if seen == self.current.revision:
            await self.changed.wait()
        return self.current

    async def address(self, name: str) -> str:
        raise AssertionError("nobody asks for an address here")


@pytest.fixture
async def server() -> AsyncIterator[tuple[rpc.Server, str]]:
    server = rpc.Server(
        {
            rpc.EXPERT_SERVICE: lambda server: expert_pb2_grpc.add_ExpertServiceServicer_to_server(
                PlayedWorker(), server
            )
        }
    )
    port = await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    yield server, f"127.0.0.1:{port}"
    await server.stop(0)


def ready(address: str, revision: int = 3) -> ProcessReport:
    return ProcessReport("w0", revision, pb.PROCESS_STATE_READY, address, "n", 1, 0)


async def test_a_described_worker_is_a_replica(server: tuple[rpc.Server, str]) -> None:
    _, address = server
    replica = (await ProcessWatch(PlayedPeers(ready(address))).describe(address)).replica
    assert (replica.worker, replica.address, replica.incarnation) == ("w0", address, "first")
    assert replica.holdings == {(ExpertAddress(1, 2), bytes(32))}


async def test_a_worker_whose_server_goes_away_is_lost_at_once(server: tuple[rpc.Server, str]) -> None:
    running, address = server
    watch = ProcessWatch(PlayedPeers(ready(address)))
    await watch.report("w0", 0)
    await watch.describe(address)
    asking = asyncio.create_task(watch.report("w0", 3))
    await asyncio.sleep(0.05)
    assert not asking.done()
    await running.stop(0)
    with pytest.raises(Unavailable) as lost:
        await asyncio.wait_for(asking, 60)
    assert lost.value.reason in EVIDENCE


async def test_a_worker_that_is_described_anew_while_it_holds_a_question_is_still_lost_at_once(
    server: tuple[rpc.Server, str],
) -> None:
    running, address = server
    watch = ProcessWatch(PlayedPeers(ready(address)))
    await watch.report("w0", 0)
    await watch.describe(address)
    asking = asyncio.create_task(watch.report("w0", 3))
    await asyncio.sleep(0)
    await watch.describe(address)
    await asyncio.wait({asking}, timeout=0.05)
    assert not asking.done()
    await running.stop(0)
    with pytest.raises(Unavailable) as lost:
        await asyncio.wait_for(asking, 60)
    assert lost.value.reason in EVIDENCE


async def test_a_broken_health_stream_of_a_worker_whose_port_still_listens_is_no_evidence() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    listening = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    peers = PlayedPeers(ready(address))
    watch = ProcessWatch(peers)
    await watch.report("w0", 0)
    peers.silent = True
    with pytest.raises(Unavailable) as missed:
        await watch.report("w0", 0)
    listening.close()
    assert missed.value.reason not in EVIDENCE
    with pytest.raises(Unavailable) as lost:
        await watch.report("w0", 0)
    assert lost.value.reason == PROCESS_DIED


async def test_a_worker_that_stops_to_serve_is_lost_and_not_described(server: tuple[rpc.Server, str]) -> None:
    running, address = server
    watch = ProcessWatch(PlayedPeers(ready(address)))
    await watch.report("w0", 0)
    await watch.describe(address)
    asking = asyncio.create_task(watch.report("w0", 3))
    await running.set_serving(False)
    with pytest.raises(Unavailable, match="it does not serve") as lost:
        await asyncio.wait_for(asking, 60)
    assert lost.value.reason in EVIDENCE
    with pytest.raises(Unavailable, match="it does not serve"):
        await watch.describe(address)


async def test_nobody_at_the_address_is_unavailable() -> None:
    watch = ProcessWatch(PlayedPeers(ready("127.0.0.1:1")))
    with pytest.raises(Unavailable, match="does not answer"):
        await watch.describe("127.0.0.1:1")


async def test_a_new_report_ends_the_wait_too(server: tuple[rpc.Server, str]) -> None:
    _, address = server
    peers = PlayedPeers(ready(address))
    watch = ProcessWatch(peers)
    await watch.report("w0", 0)
    await watch.describe(address)
    asking = asyncio.create_task(watch.report("w0", 3))
    await asyncio.sleep(0)
    peers.current = ready("127.0.0.1:9", revision=1)
    peers.changed.set()
    assert (await asyncio.wait_for(asking, 60)).address == "127.0.0.1:9"


async def test_a_ready_process_may_hold_the_question_longer_than_one_that_loads() -> None:
    peers = PlayedPeers(ready("127.0.0.1:9"))
    watch = ProcessWatch(peers)
    await watch.report("w0", 0)
    await watch.report("w0", 0)
    assert peers.holds_s[0] < peers.holds_s[1]
