"""The calls by which the controller changes what workers hold."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from cluster.control.bundle_store import BundleStore
from cluster.control.rollout import MODEL_FOLDER
from moesaic import rpc
from moesaic.epoch import ExpertVersion, version_from_proto, versions_to_proto
from moesaic.errors import from_rpc_error
from moesaic.v1 import expert_pb2, expert_pb2_grpc

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
        async with _worker(address) as worker:
            async for message in worker.Load(request, timeout=self._load_timeout_s):
                yield version_from_proto(rpc.received(message).expert)

    async def unload(self, address: str, versions: Sequence[ExpertVersion]) -> None:
        request = expert_pb2.UnloadRequest(experts=versions_to_proto(versions))
        async with _worker(address) as worker:
            await worker.Unload(request, timeout=UNLOAD_TIMEOUT_S)

    async def probe(
        self, address: str, bundle: bytes, versions: Sequence[ExpertVersion]
    ) -> Sequence[ProbeOutcome]:
        request = expert_pb2.ProbeRequest(**self._where(bundle), experts=versions_to_proto(versions))
        async with _worker(address) as worker:
            answer = rpc.received(await worker.Probe(request, timeout=PROBE_TIMEOUT_S))
        return [
            ProbeOutcome(version_from_proto(one.expert), one.ok, one.max_difference, one.max_expected)
            for one in answer.results
        ]

    def _where(self, bundle: bytes) -> dict[str, Any]:
        """The fields of a request that say where the weights are."""
        if bundle == MODEL_FOLDER:
            return {}
        folder = str(self._bundles.folder(bundle).resolve())
        return {"bundle": bundle, "control_address": self._control_address(), "folder": folder}


@asynccontextmanager
async def _worker(address: str) -> AsyncIterator[Any]:
    """The stub of the worker at HOST:PORT; what its calls end with is raised as the MoesaicError that it stands for."""
    async with rpc.aio_channel(address) as channel:
        try:
            yield expert_pb2_grpc.WorkerControlServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
