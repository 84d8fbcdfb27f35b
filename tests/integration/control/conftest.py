"""A control plane over gRPC, with played workers and a played router."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.played_workers import PlayedExpertWorker, PlayedRouter, upload

from cluster.control.control_plane import ControlPlane
from cluster.control.controller import Cluster, Member
from cluster.control.epoch_store import go_on
from cluster.control.named_workers import NamedWorkers
from cluster.control.rollout_config import RolloutConfig
from cluster.control.server import ControlServer
from moesaic import rpc
from moesaic.bundles import BaseModel, Bundle
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.families import describe_model
from moesaic.settings import RolloutSettings
from moesaic.v1 import control_pb2, control_pb2_grpc


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with four slots each."""
    return write_mixtral(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def base(base_folder: Path) -> BaseModel:
    checkpoint = open_checkpoint(base_folder)
    return BaseModel(FolderIdentity.of(checkpoint).fingerprint, describe_model(checkpoint))


MakeBundle = Callable[..., Bundle]


@pytest.fixture
def bundle(tmp_path: Path, base_folder: Path) -> MakeBundle:
    """Makes a bundle by its name: `bundle("legal", [(0, 3)])`."""

    def make(name: str, targets: list[tuple[int, int | None]], seed: int = 1, **options: Any) -> Bundle:
        folder = tmp_path / "made" / f"{name}-{seed}"
        return make_bundle(folder, base_folder, targets, name=name, seed=seed, **options)

    return make


@dataclass
class Rig:
    """A controller, started by `running`, the workers and the router that it commands."""

    config: RolloutConfig
    workers: list[PlayedExpertWorker]
    addresses: list[str] = field(default_factory=list)
    port: int = 0
    failpoints: Callable[[str], None] = go_on
    plane: ControlPlane | None = None
    stub: control_pb2_grpc.ControlServiceStub | None = None
    router: PlayedRouter | None = None

    @contextlib.asynccontextmanager
    async def running(self, *, with_router: bool = True) -> AsyncIterator[Rig]:
        """The controller, at the same port after every start; workers must serve already."""
        members = tuple(Member(it, control_pb2.PROCESS_ROLE_EXPERT_WORKER) for it in self.addresses)
        experts = frozenset(self.config.base.model.addresses)
        cluster = Cluster("tiny", experts, members, self.config.base.fingerprint)
        self.plane = ControlPlane(
            cluster, self.config, NamedWorkers(), settle_s=0.2, failpoints=self.failpoints
        )
        server = ControlServer(self.plane, "127.0.0.1", self.port)
        address = await server.start()
        await server.load()
        self.port = int(address.rpartition(":")[2])
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(server.stop, 0.0)
            channel = await stack.enter_async_context(rpc.aio_channel(address))
            self.stub = control_pb2_grpc.ControlServiceStub(channel)
            if with_router:
                self.router = await stack.enter_async_context(PlayedRouter(address).following())
            yield self

    async def upload(self, bundle: Bundle) -> control_pb2.UploadBundleResponse:
        return await upload(self.stub, bundle.folder)

    async def change(self, **request: Any) -> list[control_pb2.ChangeResponse]:
        """All steps of a change."""
        return [step async for step in self.stub.Change(control_pb2.ChangeRequest(**request))]

    async def swap(self, bundle: Bundle, **request: Any) -> list[control_pb2.ChangeResponse]:
        await self.upload(bundle)
        return await self.change(kind=control_pb2.CHANGE_KIND_SWAP, bundle=bundle.digest, **request)

    async def add(self, bundle: Bundle, **request: Any) -> list[control_pb2.ChangeResponse]:
        await self.upload(bundle)
        return await self.change(kind=control_pb2.CHANGE_KIND_ADD, bundle=bundle.digest, **request)

    async def history(self) -> control_pb2.GetHistoryResponse:
        return await self.stub.GetHistory(control_pb2.GetHistoryRequest())

    def restarted_with(self, **config: Any) -> Rig:
        """The same workers and state, with another configuration."""
        return replace(self, config=replace(self.config, **config))


@pytest.fixture
async def rig(tmp_path: Path, base: BaseModel) -> AsyncIterator[Rig]:
    """Two workers that hold everything between them twice, for a controller that is not started yet."""
    everything = frozenset(base.model.addresses)
    workers = [PlayedExpertWorker(everything), PlayedExpertWorker(everything)]
    config = RolloutConfig(
        base, tmp_path / "state", is_lasting=True, replicas=2, settings=RolloutSettings(drain_s=30)
    )
    rig = Rig(config, workers)
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            rig.addresses.append(await stack.enter_async_context(worker.serving()))
        yield rig
