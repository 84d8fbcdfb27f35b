"""The worker as a whole, in this process: when it serves, when it does not, and how it ends."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.checkpoints import write_mixtral

from expert_worker import server as server_module
from expert_worker.compute.batcher import Batcher
from expert_worker.config import WorkerConfig
from expert_worker.server import WorkerServer
from moesaic import rpc
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.epoch import ExpertAddress
from moesaic.errors import CheckpointError, InvalidArgument, Unavailable
from moesaic.families import MoeModel
from moesaic.settings import WorkerSettings
from moesaic.v1 import expert_pb2, expert_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def config(model: Path, experts: frozenset[ExpertAddress], **changes: Any) -> WorkerConfig:
    return WorkerConfig(
        **{
            "name": "w",
            "model": model,
            "experts": experts,
            "host": "127.0.0.1",
            "port": 0,
            "device": "cpu",
            "dtype": "auto",
            "settings": WorkerSettings(),
        }
        | changes
    )


SHARE = frozenset({ExpertAddress(0, 1), ExpertAddress(1, 3)})


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[WorkerServer]:
    server = WorkerServer(config(folder, SHARE))
    yield server
    await server.stop(0)


async def health(address: str, service: str = rpc.EXPERT_SERVICE) -> int:
    async with rpc.aio_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        return int(response.status)


async def test_health_is_true_from_binding_through_loading_to_the_end(server: WorkerServer) -> None:
    address = await server.start()
    assert await health(address) == NOT_SERVING
    await server.load()
    assert await health(address) == await health(address, "") == SERVING
    await server.stop(0)
    await asyncio.wait_for(server.wait(), 60)


async def test_the_loaded_bytes_are_the_share_and_no_more(server: WorkerServer, model: MoeModel) -> None:
    address = await server.start()
    assert (server.loaded_bytes, server.total_bytes) == (0, 0)
    await server.load()
    assert server.loaded_bytes == server.total_bytes == 2 * model.expert_bytes(0)
    async with rpc.aio_channel(address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        described = await stub.Describe(expert_pb2.DescribeRequest())
        stats = await stub.GetWorkerStats(expert_pb2.GetWorkerStatsRequest())
    assert {(expert.address.layer, expert.address.slot) for expert in described.experts} == SHARE
    assert described.incarnation == server.incarnation
    assert (stats.passes, stats.busy_s) == (0, 0)  # warming up is not counted


async def test_the_contents_have_a_revision_that_is_described(folder: Path) -> None:
    changes: list[int] = []
    server = WorkerServer(
        config(folder, SHARE), on_contents_change=lambda: changes.append(server.contents_revision)
    )
    address = await server.start()
    await server.load()
    assert changes == [0] * len(SHARE)  # nothing is served before all is loaded
    async with rpc.aio_channel(address) as channel:
        described = await expert_pb2_grpc.ExpertServiceStub(channel).Describe(expert_pb2.DescribeRequest())
    assert described.contents_revision == server.contents_revision == len(SHARE)
    await server.stop(0)


async def test_every_start_has_an_incarnation_of_its_own(folder: Path) -> None:
    assert WorkerServer(config(folder, SHARE)).incarnation != WorkerServer(config(folder, SHARE)).incarnation


async def test_a_worker_without_a_name_is_called_after_its_host_and_port(folder: Path) -> None:
    server = WorkerServer(config(folder, SHARE, name=""))
    address = await server.start()
    await server.load()
    async with rpc.aio_channel(address) as channel:
        described = await expert_pb2_grpc.ExpertServiceStub(channel).Describe(expert_pb2.DescribeRequest())
    await server.stop(0)
    assert described.worker == f"{socket.gethostname()}:{address.rpartition(':')[2]}"


async def test_a_folder_that_is_not_the_one_that_was_checked_elsewhere_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    elsewhere = FolderIdentity.of(open_checkpoint(write_mixtral(tmp_path / "other", seed=1)))
    server = WorkerServer(config(folder, SHARE, identity=elsewhere))
    await server.start()
    with pytest.raises(CheckpointError) as refused:
        await server.load()
    assert refused.value.reason == "OTHER_MODEL"
    assert server.loaded_bytes == 0
    await server.stop(0)


async def test_a_port_in_use_is_refused_by_name(server: WorkerServer, folder: Path) -> None:
    port = int((await server.start()).rpartition(":")[2])
    second = WorkerServer(config(folder, SHARE, port=port))
    with pytest.raises(InvalidArgument) as caught:
        await second.start()
    assert (caught.value.field, caught.value.reason) == ("port", "PORT_IN_USE")
    await second.stop(0)


@pytest.mark.parametrize(
    "experts", [frozenset(), frozenset({ExpertAddress(0, 4)}), frozenset({ExpertAddress(2, 0)})]
)
async def test_experts_that_the_model_does_not_have_are_refused(
    folder: Path, experts: frozenset[ExpertAddress]
) -> None:
    server = WorkerServer(config(folder, experts))
    address = await server.start()
    with pytest.raises(InvalidArgument) as caught:
        await server.load()
    assert caught.value.field == "experts"
    assert await health(address) == NOT_SERVING
    await server.stop(0)


async def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    server = WorkerServer(config(tmp_path / "nowhere", SHARE))
    await server.start()
    with pytest.raises(CheckpointError):
        await server.load()
    await server.stop(0)


async def test_a_stop_ends_the_loading(server: WorkerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    started, may_go_on = threading.Event(), threading.Event()
    real = server_module.load_experts

    def slow(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for loaded in real(*args, **kwargs):
            started.set()
            assert may_go_on.wait(60)
            yield loaded

    monkeypatch.setattr(server_module, "load_experts", slow)
    await server.start()
    loading = asyncio.create_task(server.load())
    assert await asyncio.to_thread(started.wait, 60)
    await server.stop(0)
    may_go_on.set()
    with pytest.raises(Unavailable):
        await loading
    assert server.loaded_bytes == 0


async def test_health_follows_the_compute_thread(
    server: WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "HEALTH_PERIOD_S", 0.01)
    address = await server.start()
    await server.load()
    for healthy, expected in ((False, NOT_SERVING), (True, SERVING)):
        monkeypatch.setattr(Batcher, "is_healthy", lambda _, healthy=healthy: healthy)
        async with asyncio.timeout(60):
            while await health(address) != expected:
                await asyncio.sleep(0.01)


async def test_stop_may_come_twice_and_before_the_start(folder: Path) -> None:
    server = WorkerServer(config(folder, SHARE))
    await server.stop(0)
    await server.stop(0)
