"""The calls by which the controller changes what workers hold."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from cluster.control.bundle_store import BundleStore
from cluster.control.rollout import MODEL_FOLDER
from moesaic import rpc
from moesaic.epoch import ExpertAddress, ExpertVersion, versions_to_proto
from moesaic.errors import from_rpc_error
from moesaic.v1 import common_pb2, expert_pb2, expert_pb2_grpc

# Giving versions up takes a moment; computing probe vectors may wait for the calls of routers.
UNLOAD_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ProbeOutcome:
    """What a held version answers to the probe vectors of its bundle."""

    version: ExpertVersion
    ok: bool
    max_difference: float
    max_expected: float


class WorkerCalls(Protocol):
    """Calls of the worker at HOST:PORT. They raise MoesaicError; `bundle` is a digest, or MODEL_FOLDER."""

    def load(
        self, address: str, bundle: bytes, versions: Sequence[ExpertVersion]
    ) -> AsyncIterator[ExpertVersion]:
        """Each version as soon as it is loaded. Nothing stays of a call that fails."""
        ...

    async def unload(self, address: str, versions: Sequence[ExpertVersion]) -> None: ...

    async def probe(
        self, address: str, bundle: bytes, versions: Sequence[ExpertVersion]
    ) -> Sequence[ProbeOutcome]: ...


class GrpcWorkerCalls:
    """WorkerCalls over gRPC. Workers fetch bundles from the folder, if it is theirs, too, or from this controller."""

    def __init__(
        self, bundles: BundleStore, control_address: Callable[[], str], *, load_timeout_s: float
    ) -> None:
        self._bundles = bundles
        self._control_address = control_address
        self._load_timeout_s = load_timeout_s

    async def load(
        self, address: str, bundle: bytes, versions: Sequence[ExpertVersion]
    ) -> AsyncIterator[ExpertVersion]:
        request = expert_pb2.LoadRequest(**self._where(bundle), experts=versions_to_proto(versions))
        async with rpc.aio_channel(address) as channel:
            stub = expert_pb2_grpc.WorkerControlServiceStub(channel)
            try:
                async for message in stub.Load(request, timeout=self._load_timeout_s):
                    yield _version(message.expert)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

    async def unload(self, address: str, versions: Sequence[ExpertVersion]) -> None:
        request = expert_pb2.UnloadRequest(experts=versions_to_proto(versions))
        async with rpc.aio_channel(address) as channel:
            stub = expert_pb2_grpc.WorkerControlServiceStub(channel)
            try:
                await stub.Unload(request, timeout=UNLOAD_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error

    async def probe(
        self, address: str, bundle: bytes, versions: Sequence[ExpertVersion]
    ) -> Sequence[ProbeOutcome]:
        request = expert_pb2.ProbeRequest(**self._where(bundle), experts=versions_to_proto(versions))
        async with rpc.aio_channel(address) as channel:
            stub = expert_pb2_grpc.WorkerControlServiceStub(channel)
            try:
                answer = await stub.Probe(request, timeout=PROBE_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
        return [
            ProbeOutcome(_version(one.expert), one.ok, one.max_difference, one.max_expected)
            for one in answer.results
        ]

    def _where(self, bundle: bytes) -> dict[str, Any]:
        """The fields of a request that say where the weights are."""
        if bundle == MODEL_FOLDER:
            return {}
        folder = str(self._bundles.folder(bundle).resolve())
        return {"bundle": bundle, "control_address": self._control_address(), "folder": folder}


def _version(message: common_pb2.ExpertVersion) -> ExpertVersion:
    return ExpertVersion(ExpertAddress(message.address.layer, message.address.slot), message.digest)
