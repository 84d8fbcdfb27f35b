"""Experts that are loaded, probed and unloaded over gRPC while the worker serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.bundles import make_bundle
from support.expert_calls import compute_request

from expert_worker.config import WorkerConfig
from expert_worker.server import WorkerServer
from moesaic import rpc
from moesaic.bundles import Bundle
from moesaic.epoch import ExpertAddress, ExpertVersion, version_to_proto, versions_from_proto
from moesaic.errors import MoesaicError, from_rpc_error
from moesaic.settings import WorkerSettings
from moesaic.v1 import expert_pb2, expert_pb2_grpc

SHARE = frozenset({ExpertAddress(0, 1), ExpertAddress(1, 3)})
HIDDEN = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
# A new expert's slot: the first above those of the model.
NEW = 4


class Site:
    """A worker that serves, and clients of it."""

    def __init__(self, server: WorkerServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.control = expert_pb2_grpc.WorkerControlServiceStub(channel)
        self.experts = expert_pb2_grpc.ExpertServiceStub(channel)

    async def held(self) -> frozenset[ExpertVersion]:
        described = await self.experts.Describe(expert_pb2.DescribeRequest(), timeout=10)
        return versions_from_proto(described.experts)

    async def load(
        self, versions: Iterable[ExpertVersion], bundle: Bundle | None = None, **fields: Any
    ) -> list[expert_pb2.LoadResponse]:
        return [response async for response in self.control.Load(load_request(versions, bundle, **fields))]

    async def refused(
        self, versions: Iterable[ExpertVersion], bundle: Bundle | None = None, **fields: Any
    ) -> MoesaicError:
        """Why a load is refused. Nothing changes then."""
        before = await self.held()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.load(versions, bundle, **fields)
        assert await self.held() == before
        return from_rpc_error(caught.value)

    async def unload(self, versions: Iterable[ExpertVersion]) -> None:
        await self.control.Unload(
            expert_pb2.UnloadRequest(experts=map(version_to_proto, versions)), timeout=30
        )

    async def probe(
        self, versions: Iterable[ExpertVersion], bundle: Bundle
    ) -> Sequence[expert_pb2.ProbeResult]:
        request = expert_pb2.ProbeRequest(
            bundle=bundle.digest, experts=map(version_to_proto, versions), folder=str(bundle.folder)
        )
        return (await self.control.Probe(request, timeout=30)).results

    async def compute(self, version: ExpertVersion) -> expert_pb2.ComputeResponse:
        (layer, slot), digest = version
        request = compute_request(HIDDEN, {slot: [0, 2, 5]}, {version.address: digest}, layer=layer)
        stream = self.experts.Compute()
        await stream.write(request)
        response: expert_pb2.ComputeResponse = await asyncio.wait_for(stream.read(), 10)
        stream.cancel()
        return response


def load_request(
    versions: Iterable[ExpertVersion], bundle: Bundle | None, **fields: Any
) -> expert_pb2.LoadRequest:
    known = {} if bundle is None else {"bundle": bundle.digest, "folder": str(bundle.folder)}
    return expert_pb2.LoadRequest(experts=map(version_to_proto, versions), **known | fields)


def versions_of(bundle: Bundle, new: int = NEW) -> list[ExpertVersion]:
    return [
        ExpertVersion(
            ExpertAddress(expert.layer, new if expert.slot is None else expert.slot),
            bytes.fromhex(expert.version),
        )
        for expert in bundle.manifest.experts
    ]


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[Site]:
    server = WorkerServer(
        WorkerConfig("w", folder, SHARE, "127.0.0.1", 0, "cpu", "auto", WorkerSettings(**settings))
    )
    address = await server.start()
    await server.load()
    try:
        async with rpc.aio_channel(address) as channel:
            yield Site(server, channel)
    finally:
        await server.stop(0)


@pytest.fixture
async def site(folder: Path) -> AsyncIterator[Site]:
    async with serving(folder) as site:
        yield site


async def test_an_expert_of_a_bundle_is_loaded_probed_computed_and_unloaded(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b", folder, [(0, None), (1, None)])
    versions, before = versions_of(bundle), await site.held()
    revision = site.server.contents_revision
    steps = await site.load(versions, bundle)
    assert [step.expert for step in steps] == [version_to_proto(version) for version in versions]
    assert steps[-1].loaded_bytes == steps[-1].total_bytes > 0
    assert await site.held() == before | set(versions)
    assert site.server.contents_revision == revision + 2
    results = await site.probe(versions, bundle)
    assert [result.ok for result in results] == [True, True]
    assert all(result.max_difference < 1e-4 * result.max_expected for result in results)
    response = await site.compute(versions[1])
    assert not response.HasField("error") and list(response.versions) == [versions[1].digest]
    await site.unload([*versions, ExpertVersion(ExpertAddress(0, 77), bytes(32))])
    assert await site.held() == before
    assert (await site.compute(versions[1])).HasField("error")
