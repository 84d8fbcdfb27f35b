"""The service of a router that is still loading."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from moesaic.errors import Unavailable
from moesaic.v1 import inference_pb2, inference_pb2_grpc
from router.api.service import InferenceService


class LoadingService(inference_pb2_grpc.InferenceServiceServicer):
    """Passes calls on to `service` once it is set. Until then every call is refused with Unavailable."""

    def __init__(self) -> None:
        self.service: InferenceService | None = None

    def _open(self) -> InferenceService:
        if self.service is None:
            raise Unavailable("the router is loading", reason="LOADING", retry_after_s=1.0)
        return self.service

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        async for response in self._open().Generate(request, context):
            yield response

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> Any:
        return await self._open().Tokenize(request, context)

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Any) -> Any:
        return await self._open().Detokenize(request, context)

    async def GetModelInfo(self, request: inference_pb2.GetModelInfoRequest, context: Any) -> Any:
        return await self._open().GetModelInfo(request, context)

    async def GetRouterStats(self, request: inference_pb2.GetRouterStatsRequest, context: Any) -> Any:
        return await self._open().GetRouterStats(request, context)
