"""ControlService: between gRPC messages and the control plane."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import grpc

from cluster.control.bundle_needs import Need, bundle_needs
from cluster.control.bundle_store import Upload
from cluster.control.change_order import MAX_OPERATOR, ChangeOrder
from cluster.control.control_plane import ControlPlane
from cluster.control.epoch_store import Decision
from moesaic.epoch import Epoch, address_to_proto
from moesaic.errors import InvalidArgument, NotFound
from moesaic.v1 import common_pb2, control_pb2, control_pb2_grpc

MAX_HISTORY = 10_000
_DEFAULT_HISTORY = 100

Context = grpc.aio.ServicerContext[Any, Any]
_R = TypeVar("_R")


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Serves one control plane."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def Watch(
        self, request: control_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[control_pb2.WatchResponse]:
        async for snapshot in self._plane.controller.watch():
            yield snapshot.to_proto()

    async def GetTopology(
        self, request: control_pb2.GetTopologyRequest, context: Context
    ) -> control_pb2.GetTopologyResponse:
        return self._plane.controller.topology()

    async def UploadBundle(
        self, requests: AsyncIterator[control_pb2.UploadBundleRequest], context: Context
    ) -> control_pb2.UploadBundleResponse:
        # Not in a thread: a caller who leaves while that runs would leave the upload behind.
        upload = self._plane.bundles.upload()
        try:
            async for request in requests:
                await _to_its_end(partial(_write, upload, request))
            bundle, known = await _to_its_end(upload.finish)
        finally:
            await asyncio.to_thread(upload.close)
        return control_pb2.UploadBundleResponse(name=bundle.manifest.name, digest=bundle.digest, known=known)

    async def FetchBundle(
        self, request: control_pb2.FetchBundleRequest, context: Context
    ) -> AsyncIterator[control_pb2.FetchBundleResponse]:
        bundles = self._plane.bundles
        bundle = await asyncio.to_thread(bundles.open, request.digest)
        yield control_pb2.FetchBundleResponse(manifest=bundle.manifest_bytes)
        pieces = bundles.pieces(request.digest, request.offset)
        while piece := await asyncio.to_thread(next, pieces, b""):
            yield control_pb2.FetchBundleResponse(weights=piece)

    async def ListBundles(
        self, request: control_pb2.ListBundlesRequest, context: Context
    ) -> control_pb2.ListBundlesResponse:
        digests = await asyncio.to_thread(self._plane.bundles.digests)
        needs = bundle_needs(self._plane.epochs)
        answer = control_pb2.ListBundlesResponse()
        for digest in digests:
            with contextlib.suppress(NotFound):  # it was forgotten meanwhile
                answer.bundles.append(await asyncio.to_thread(self._stored, digest, needs.get(digest)))
        return answer

    async def ForgetBundle(
        self, request: control_pb2.ForgetBundleRequest, context: Context
    ) -> control_pb2.ForgetBundleResponse:
        operator = request.operator[:MAX_OPERATOR]
        name, num_bytes = await self._plane.forgetting.forget(request.digest, operator)
        return control_pb2.ForgetBundleResponse(name=name, num_bytes=num_bytes)

    async def Change(
        self, request: control_pb2.ChangeRequest, context: Context
    ) -> AsyncIterator[control_pb2.ChangeResponse]:
        progress = self._plane.changes.begin(ChangeOrder.from_proto(request))
        async for step in progress.follow():
            yield step.to_proto()

    async def GetHistory(
        self, request: control_pb2.GetHistoryRequest, context: Context
    ) -> control_pb2.GetHistoryResponse:
        limit = min(request.limit or _DEFAULT_HISTORY, MAX_HISTORY)
        head, verdict = self._plane.epochs.head, self._plane.canary_watch.verdict()
        return control_pb2.GetHistoryResponse(
            epoch=head.current if head else "",
            canary=head.canary.epoch if head and head.canary else "",
            canary_figures=verdict.detail if verdict else "",
            entries=[_entry(decision) for decision in self._plane.store.history(limit)],
        )

    async def ReportEpochs(
        self, request: control_pb2.ReportEpochsRequest, context: Context
    ) -> control_pb2.ReportEpochsResponse:
        if not request.router:
            raise InvalidArgument("router: is missing", field="router")
        self._plane.hear(request)
        return control_pb2.ReportEpochsResponse()

    def _stored(self, digest: bytes, need: Need | None) -> control_pb2.StoredBundle:
        bundle = self._plane.bundles.open(digest)
        epochs = self._plane.epochs
        return control_pb2.StoredBundle(
            name=bundle.manifest.name,
            digest=digest,
            tags=bundle.manifest.tags,
            num_bytes=bundle.num_bytes,
            manifest=bundle.manifest_bytes,
            experts=_places(digest, epochs.current),
            canary_experts=_places(digest, epochs.canary),
            needed_by=need.epoch if need else "",
        )


def _places(digest: bytes, epoch: Epoch | None) -> list[common_pb2.ExpertAddress]:
    """The slots that a bundle has in an epoch."""
    return [
        address_to_proto(address)
        for used in (epoch.bundles if epoch else ())
        if used.digest == digest
        for address in used.experts
    ]


async def _to_its_end(work: Callable[[], _R]) -> _R:
    """Works in a thread, which is awaited also when the caller leaves: nothing may be cleaned up under its hands."""
    working = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.gather(working, return_exceptions=True)
        raise


def _write(upload: Upload, request: control_pb2.UploadBundleRequest) -> None:
    match request.WhichOneof("part"):
        case "manifest":
            upload.write_manifest(request.manifest)
        case "signature":
            upload.write_signature(request.signature)
        case "weights":
            upload.write_weights(request.weights)
        case _:
            raise InvalidArgument("part: is missing", field="part")


def _entry(decision: Decision) -> control_pb2.HistoryEntry:
    return control_pb2.HistoryEntry(
        time=decision.time,
        what=decision.what,
        epoch=decision.epoch,
        previous_epoch=decision.previous_epoch,
        bundle=decision.bundle,
        operator=decision.operator,
        detail=decision.detail,
    )
