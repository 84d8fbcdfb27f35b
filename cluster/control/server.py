"""The controller as a server: ControlService over gRPC, and the loops of the control plane.

Routers follow Watch and report; operators upload bundles and change the model; `moesaic status` calls GetTopology. While
the controller is away, routers go on with their last table, and they follow it again as soon as it is back.
"""

from __future__ import annotations

import asyncio
import logging

import grpc

from cluster.control.control_plane import ControlPlane
from cluster.control.service import ControlService
from moesaic import rpc
from moesaic.addresses import address_for_callers, join_address
from moesaic.v1 import control_pb2_grpc

log = logging.getLogger(__name__)

# The pause before the loop of a controller that failed by a bug is started anew.
RESTART_S = 1.0


class ControlServer:
    """A hosted server that runs a control plane and its gRPC port. `host` is also where workers reach it, unless it is
    every address of `node`."""

    loaded_bytes = 0
    total_bytes = 0
    contents_revision = 0

    def __init__(self, plane: ControlPlane, host: str, port: int = 0, node: str = "127.0.0.1") -> None:
        self._plane = plane
        self._host = host
        self._port = port
        self._node = node
        # Manifests travel whole.
        self._server = rpc.Server(
            {rpc.CONTROL_SERVICE: self._add_servicer}, max_message_bytes=rpc.DATA_MESSAGE_BYTES
        )
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> str:
        address = join_address(self._host, await self._server.start(self._host, self._port))
        self._plane.address = address_for_callers(address, self._node)
        self._loop = asyncio.create_task(self._keep_running())
        return address

    async def load(self) -> None:
        await self._server.set_serving(True)

    async def stop(self, drain_s: float) -> None:
        """Streams of watchers never end by themselves, so there is nothing to drain."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        await self._server.stop(0.0)
        self._plane.close()

    def _add_servicer(self, server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(self._plane), server)

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._plane.run()
            except Exception:  # the loop of this process
                log.exception("the controller failed")
                await asyncio.sleep(RESTART_S)
