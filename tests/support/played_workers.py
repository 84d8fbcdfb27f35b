"""Expert workers and routers that only play their part in a rollout, over real gRPC and without computing anything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from moesaic import rpc
from moesaic.bundles import open_bundle
from moesaic.epoch import (
    Epoch,
    ExpertAddress,
    ExpertVersion,
    VersionHasher,
    versions_from_proto,
    versions_to_proto,
)
from moesaic.errors import FailedPrecondition, MoesaicError
from moesaic.v1 import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc

EXPERT_BYTES = 1000


def folder_version(address: ExpertAddress) -> ExpertVersion:
    """The version that the played model folder has of a slot."""
    hasher = VersionHasher("played", "float32")
    hasher.update("slot", tuple(address), b"")
    return ExpertVersion(address, hasher.digest())


@dataclass
class PlayedExpertWorker(expert_pb2_grpc.ExpertServiceServicer, expert_pb2_grpc.WorkerControlServiceServicer):
    """Holds what it is told to. `home` are the slots that it begins with at every start."""

    home: frozenset[ExpertAddress]
    room: int = 100
    held: set[ExpertVersion] = field(default_factory=set)
    revision: int = 1
    starts: int = 0
    # What the next calls do: wrong answers to probe vectors, an error of Load.
    wrong_probe: bool = False
    load_error: MoesaicError | None = None
    loads: list[expert_pb2.LoadRequest] = field(default_factory=list)
    # Loading waits for this.
    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    def __post_init__(self) -> None:
        self.may_load.set()

    async def Describe(self, request: object, context: object) -> expert_pb2.DescribeResponse:
        return expert_pb2.DescribeResponse(
            worker="played",
            incarnation=f"start-{self.port}-{self.starts}",
            model="tiny",
            experts=versions_to_proto(self.held),
            contents_revision=self.revision,
            available_bytes=(self.room - len(self.held)) * EXPERT_BYTES,
            weight_bytes=len(self.held) * EXPERT_BYTES,
        )

    async def Load(
        self, request: expert_pb2.LoadRequest, context: object
    ) -> AsyncIterator[expert_pb2.LoadResponse]:
        self.loads.append(request)
        await self.may_load.wait()
        if self.load_error is not None:
            raise self.load_error
        wanted = versions_from_proto(request.experts)
        if not wanted <= self._offered(request):
            raise FailedPrecondition("the source has no such version")
        if len(self.held | wanted) > self.room:
            raise FailedPrecondition("it does not fit", reason="OUT_OF_MEMORY")
        for version in sorted(wanted):
            yield expert_pb2.LoadResponse(expert=versions_to_proto([version])[0])
        self.held |= wanted
        self.revision += 1

    async def Unload(self, request: expert_pb2.UnloadRequest, context: object) -> expert_pb2.UnloadResponse:
        self.held -= versions_from_proto(request.experts)
        self.revision += 1
        return expert_pb2.UnloadResponse()

    async def Probe(self, request: expert_pb2.ProbeRequest, context: object) -> expert_pb2.ProbeResponse:
        assert versions_from_proto(request.experts) <= self.held
        return expert_pb2.ProbeResponse(
            results=[
                expert_pb2.ProbeResult(
                    expert=expert, ok=not self.wrong_probe, max_difference=0.5, max_expected=2.0
                )
                for expert in request.experts
            ]
        )

    def _offered(self, request: expert_pb2.LoadRequest) -> frozenset[ExpertVersion]:
        if not request.bundle:
            return frozenset(map(folder_version, self.home))
        digests = {expert.version for expert in open_bundle(request.folder).manifest.experts}
        return frozenset(
            version for version in versions_from_proto(request.experts) if version.digest.hex() in digests
        )

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """At the same port after every start, with what it has at home."""
        self.starts += 1
        self.held, self.revision = set(map(folder_version, self.home)), 1
        server = rpc.Server(
            {
                rpc.EXPERT_SERVICE: lambda it: expert_pb2_grpc.add_ExpertServiceServicer_to_server(self, it),
                "moesaic.v1.WorkerControlService": lambda it: (
                    expert_pb2_grpc.add_WorkerControlServiceServicer_to_server(self, it)
                ),
            }
        )
        self.port = await server.start("127.0.0.1", self.port)
        await server.set_serving(True)
        try:
            yield f"127.0.0.1:{self.port}"
        finally:
            await server.stop(0)


@dataclass
class PlayedRouter:
    """Follows a controller, and reports after every snapshot and every few milliseconds."""

    control: str
    name: str = "router-0"
    epoch: Epoch | None = None
    canary: control_pb2.Canary | None = None
    revision: int = 0
    # Epochs in which sequences run.
    pinned: set[str] = field(default_factory=set)
    stats: dict[str, control_pb2.EpochStats] = field(default_factory=dict)
    # Every snapshot whose epoch is held by no worker of its table would be listed here.
    impossible: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[PlayedRouter]:
        tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._report())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async with rpc.aio_channel(self.control) as channel:
                    stub = control_pb2_grpc.ControlServiceStub(channel)
                    async for message in stub.Watch(control_pb2.WatchRequest()):
                        self._see(message)
            await asyncio.sleep(0.02)

    def _see(self, message: control_pb2.WatchResponse) -> None:
        self.revision = message.routing_table.revision
        held = frozenset[ExpertVersion]().union(
            *(versions_from_proto(replica.experts) for replica in message.routing_table.replicas)
        )
        self.canary = message.canary if message.HasField("canary") else None
        if message.epoch.id and (self.epoch is None or message.epoch.id != self.epoch.id):
            self.epoch = Epoch.from_proto(message.epoch)
            if not self.epoch.expert_versions <= held:
                self.impossible.append(self.epoch.id)

    async def _report(self) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async with rpc.aio_channel(self.control) as channel:
                    stub = control_pb2_grpc.ControlServiceStub(channel)
                    while True:
                        await stub.ReportEpochs(self._message())
                        await asyncio.sleep(0.02)
            await asyncio.sleep(0.02)

    def _message(self) -> control_pb2.ReportEpochsRequest:
        stats = dict(self.stats)
        for epoch in self.pinned:
            stats[epoch] = control_pb2.EpochStats(epoch=epoch, open_sequences=1)
        return control_pb2.ReportEpochsRequest(
            router=self.name,
            incarnation="1",
            address="127.0.0.1:1",
            epoch=self.epoch.id if self.epoch else "",
            canary=self.canary.epoch.id if self.canary else "",
            routing_table_revision=self.revision,
            epochs=list(stats.values()),
        )


async def upload(
    stub: control_pb2_grpc.ControlServiceStub, folder: Path, *, signature: bytes | None = None
) -> control_pb2.UploadBundleResponse:
    """Sends the files of a folder as they are."""

    async def parts() -> AsyncIterator[control_pb2.UploadBundleRequest]:
        yield control_pb2.UploadBundleRequest(manifest=(folder / "manifest.json").read_bytes())
        if signature is not None:
            yield control_pb2.UploadBundleRequest(signature=signature)
        weights = (folder / "weights.safetensors").read_bytes()
        for first in range(0, len(weights), 1000):
            yield control_pb2.UploadBundleRequest(weights=weights[first : first + 1000])

    answer: control_pb2.UploadBundleResponse = await stub.UploadBundle(parts())
    return answer
