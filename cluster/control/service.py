"""The controller as a server: ControlService over gRPC, and the loop of the controller.

Routers follow Watch; `moesaic status` calls GetTopology. While the controller is away, routers go on with
their last table, and they follow it again as soon as it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from cluster.control.controller import Controller
from moesaic import rpc
from moesaic.addresses import join_address
from moesaic.v1 import control_pb2, control_pb2_grpc

log = logging.getLogger(__name__)

# The pause before the loop of a controller that failed by a bug is started anew.
RESTART_S = 1.0


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Translates between gRPC messages and the controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def Watch(
        self, request: control_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[control_pb2.WatchResponse]:
        async for snapshot in self._controller.watch():
            yield control_pb2.WatchResponse(
                epoch=snapshot.epoch.to_proto() if snapshot.epoch else None,
                routing_table=snapshot.table.to_proto(),
            )

    async def GetTopology(
        self, request: control_pb2.GetTopologyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.GetTopologyResponse:
        return self._controller.topology()


class ControlServer:
    """A hosted server that runs the controller's loop and its gRPC port."""

    loaded_bytes = 0
    total_bytes = 0
    contents_revision = 0

    def __init__(self, controller: Controller, host: str) -> None:
        self._controller = controller
        self._host = host
        self._server = rpc.Server({rpc.CONTROL_SERVICE: self._add_servicer})
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> str:
        port = await self._server.start(self._host, 0)
        self._loop = asyncio.create_task(self._keep_running())
        return join_address(self._host, port)

    async def load(self) -> None:
        await self._server.set_serving(True)

    async def stop(self, drain_s: float) -> None:
        """Streams of watchers never end by themselves, so there is nothing to drain."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        await self._server.stop(0.0)

    def _add_servicer(self, server: grpc.aio.Server) -> None:
        service = ControlService(self._controller)
        control_pb2_grpc.add_ControlServiceServicer_to_server(service, server)

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._controller.run()
            except Exception:  # the loop of this process
                log.exception("the controller failed")
                await asyncio.sleep(RESTART_S)
