"""A controller and a router that only play changes: real gRPC, bundles kept in memory, stages as a script says."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from moesaic import rpc
from moesaic.bundles.manifest import Manifest
from moesaic.errors import MoesaicError
from moesaic.v1 import common_pb2, control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

STAGES = (
    (control_pb2.CHANGE_STAGE_VERIFY, "2 tensors", 2),
    (control_pb2.CHANGE_STAGE_LOAD, "2 of 2 experts on 1 worker", 2),
    (control_pb2.CHANGE_STAGE_PROBE, "2 experts answer as they must", 2),
    (control_pb2.CHANGE_STAGE_PUBLISH, "revision 8", 0),
    (control_pb2.CHANGE_STAGE_COMMIT, "committed", 0),
    (control_pb2.CHANGE_STAGE_SPREAD, "1 of 1 routers", 1),
    (control_pb2.CHANGE_STAGE_DRAIN, "no sequence is left in the old epoch", 0),
    (control_pb2.CHANGE_STAGE_UNLOAD, "2 experts", 2),
    (control_pb2.CHANGE_STAGE_DONE, "", 0),
)


@dataclass
class PlayedLifecycle(control_pb2_grpc.ControlServiceServicer):
    """The stages of every change are STAGES, unless `error` comes after the first `error_after` of them."""

    epoch: str = "1111111111111111"
    bundles: dict[bytes, control_pb2.StoredBundle] = field(default_factory=dict)
    uploads: int = 0
    changes: list[control_pb2.ChangeRequest] = field(default_factory=list)
    history: control_pb2.GetHistoryResponse = field(default_factory=control_pb2.GetHistoryResponse)
    error: MoesaicError | None = None
    error_after: int = 0
    # Whether old sequences run on for ever behind a change, and whether somebody left while they did.
    drains_for_ever: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def UploadBundle(
        self, requests: AsyncIterator[control_pb2.UploadBundleRequest], context: object
    ) -> control_pb2.UploadBundleResponse:
        self.uploads += 1
        manifest, num_bytes = b"", 0
        async for request in requests:
            manifest = request.manifest or manifest
            num_bytes += len(request.weights)
        digest, read = hashlib.sha256(manifest).digest(), Manifest.from_json(manifest)
        self.bundles[digest] = control_pb2.StoredBundle(
            name=read.name, digest=digest, tags=read.tags, num_bytes=num_bytes, manifest=manifest
        )
        return control_pb2.UploadBundleResponse(name=read.name, digest=digest)

    async def ListBundles(self, request: object, context: object) -> control_pb2.ListBundlesResponse:
        return control_pb2.ListBundlesResponse(bundles=self.bundles.values())

    async def ForgetBundle(
        self, request: control_pb2.ForgetBundleRequest, context: object
    ) -> control_pb2.ForgetBundleResponse:
        if self.error is not None:
            raise self.error
        gone = self.bundles.pop(request.digest)
        return control_pb2.ForgetBundleResponse(name=gone.name, num_bytes=gone.num_bytes)

    async def Change(
        self, request: control_pb2.ChangeRequest, context: object
    ) -> AsyncIterator[control_pb2.ChangeResponse]:
        self.changes.append(request)
        committed = False
        for number, (stage, detail, total) in enumerate(STAGES):
            if self.error is not None and number >= self.error_after:
                raise self.error
            committed = committed or stage == control_pb2.CHANGE_STAGE_COMMIT
            yield control_pb2.ChangeResponse(
                stage=stage,
                detail=detail,
                done=total,
                total=total,
                epoch="2222222222222222" if committed else "",
                previous_epoch=self.epoch if committed else "",
            )
            if self.drains_for_ever and stage == control_pb2.CHANGE_STAGE_DRAIN:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.left.set()

    async def GetHistory(
        self, request: control_pb2.GetHistoryRequest, context: object
    ) -> control_pb2.GetHistoryResponse:
        return self.history


@dataclass
class PlayedRouterControl(inference_pb2_grpc.InferenceServiceServicer):
    """A router that follows a controller. What it reads of texts is `hidden`, by (state, all_tokens)."""

    control_address: str = ""
    hidden: dict[tuple[int, bool], dict[int, np.ndarray]] = field(default_factory=dict)
    read: list[inference_pb2.CaptureHiddenRequest] = field(default_factory=list)
    measured: list[inference_pb2.MeasureGateRowsRequest] = field(default_factory=list)
    taken: int = 3

    async def GetModelInfo(self, request: object, context: object) -> inference_pb2.GetModelInfoResponse:
        return inference_pb2.GetModelInfoResponse(
            model="tiny", family="mixtral", control_address=self.control_address
        )

    async def CaptureHidden(
        self, request: inference_pb2.CaptureHiddenRequest, context: object
    ) -> inference_pb2.CaptureHiddenResponse:
        self.read.append(request)
        layers = self.hidden[request.state, request.all_tokens]
        return inference_pb2.CaptureHiddenResponse(
            layers=[
                inference_pb2.LayerHidden(layer=layer, mean=mean.astype("<f4").tobytes())
                for layer, mean in layers.items()
            ]
        )

    async def MeasureGateRows(
        self, request: inference_pb2.MeasureGateRowsRequest, context: object
    ) -> inference_pb2.MeasureGateRowsResponse:
        self.measured.append(request)
        layers = sorted({row.address.layer for row in request.rows})
        return inference_pb2.MeasureGateRowsResponse(
            layers=[
                inference_pb2.LayerShare(layer=layer, tokens=12, taken=self.taken, condition_number=2.5)
                for layer in layers
            ]
        )


@asynccontextmanager
async def playing_lifecycle(
    controller: PlayedLifecycle, router: PlayedRouterControl | None = None
) -> AsyncIterator[tuple[str, str]]:
    """The addresses of a router and of the controller that it follows."""
    router = router or PlayedRouterControl()
    served = rpc.Server(
        {
            "moesaic.v1.ControlService": lambda it: control_pb2_grpc.add_ControlServiceServicer_to_server(
                controller, it
            )
        }
    )
    asked = rpc.Server(
        {
            "moesaic.v1.InferenceService": lambda it: (
                inference_pb2_grpc.add_InferenceServiceServicer_to_server(router, it)
            ),
            "moesaic.v1.RouterControlService": lambda it: (
                inference_pb2_grpc.add_RouterControlServiceServicer_to_server(router, it)
            ),
        }
    )
    control_address = f"127.0.0.1:{await served.start('127.0.0.1', 0)}"
    try:
        router.control_address = router.control_address or control_address
        router_address = f"127.0.0.1:{await asked.start('127.0.0.1', 0)}"
        try:
            yield router_address, control_address
        finally:
            await asked.stop(0)
    finally:
        await served.stop(0)


def stored(
    name: str, *, digest: bytes, manifest: bytes, layers: int = 2, slot: int = 4
) -> control_pb2.StoredBundle:
    """A bundle in use in one slot of the first layers."""
    return control_pb2.StoredBundle(
        name=name,
        digest=digest,
        tags=["maths"],
        num_bytes=5_000_000,
        manifest=manifest,
        experts=[common_pb2.ExpertAddress(layer=layer, slot=slot) for layer in range(layers)],
    )
