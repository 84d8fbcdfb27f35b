"""A cluster of servers that only report: routers, a controller and expert workers over real gRPC, without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from moesaic import rpc
from moesaic.errors import MoesaicError
from moesaic.v1 import (
    control_pb2,
    control_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)


@dataclass
class PlayedRouter(inference_pb2_grpc.InferenceServiceServicer):
    stats: inference_pb2.GetRouterStatsResponse
    control_address: str = ""
    error: MoesaicError | None = None

    async def GetModelInfo(self, request: object, context: object) -> inference_pb2.GetModelInfoResponse:
        if self.error is not None:
            raise self.error
        return inference_pb2.GetModelInfoResponse(
            model="tiny", family="mixtral", epoch="e1", num_layers=2, control_address=self.control_address
        )

    async def GetRouterStats(self, request: object, context: object) -> inference_pb2.GetRouterStatsResponse:
        return self.stats


@dataclass
class PlayedWorker(expert_pb2_grpc.ExpertServiceServicer):
    stats: expert_pb2.GetWorkerStatsResponse
    times_asked: int = 0

    async def GetWorkerStats(self, request: object, context: object) -> expert_pb2.GetWorkerStatsResponse:
        self.times_asked += 1
        return self.stats


@dataclass
class PlayedController(control_pb2_grpc.ControlServiceServicer):
    topology: control_pb2.GetTopologyResponse = field(default_factory=control_pb2.GetTopologyResponse)

    async def GetTopology(self, request: object, context: object) -> control_pb2.GetTopologyResponse:
        return self.topology


@asynccontextmanager
async def playing(
    servicer: PlayedRouter | PlayedWorker | PlayedController,
) -> AsyncIterator[tuple[str, rpc.Server]]:
    """The servicer on a port of loopback: its address and its server."""
    server = rpc.Server(_registration(servicer))
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        await server.stop(0)


def _registration(
    servicer: PlayedRouter | PlayedWorker | PlayedController,
) -> dict[str, Callable[[grpc.aio.Server], None]]:
    match servicer:
        case PlayedRouter():
            return {
                "moesaic.v1.InferenceService": lambda it: (
                    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, it)
                )
            }
        case PlayedWorker():
            return {
                "moesaic.v1.ExpertService": lambda it: expert_pb2_grpc.add_ExpertServiceServicer_to_server(
                    servicer, it
                )
            }
        case PlayedController():
            return {
                "moesaic.v1.ControlService": lambda it: control_pb2_grpc.add_ControlServiceServicer_to_server(
                    servicer, it
                )
            }
