"""Makes the server that a process of the cluster runs, from its spec."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING

from cluster.checkpoints.model_source import find_here
from cluster.control.control_plane import ControlPlane
from cluster.control.peers import Peers
from cluster.control.process_watch import ProcessWatch
from cluster.control.server import ControlServer
from cluster.processes.host import HostedServer
from cluster.processes.specs import (
    CONTROLLER,
    ControllerSpec,
    ExpertWorkerSpec,
    GatewaySpec,
    ProcessSpec,
    RouterSpec,
)
from moesaic.garbage import lasting_imports

if TYPE_CHECKING:
    from gateway.server import GatewayServer
    from router.server import RouterServer

READY_PERIOD_S = 0.1
READY_TIMEOUT_S = 5.0

# The revisions of a controller that was restarted n times begin at n times this, above those of every earlier
# start.
_REVISIONS_PER_START = 1 << 32


@dataclass(frozen=True, slots=True)
class ProcessContext:
    """What a process is given: the address of its node, its number of restarts, and the other processes."""

    node: str
    restarts: int
    peers: Peers


async def make_server(
    spec: ProcessSpec, context: ProcessContext, on_contents_change: Callable[[], object]
) -> HostedServer:
    """The server of this process, not yet started. It calls `on_contents_change` from any thread."""
    match spec:
        case ControllerSpec():
            observer = ProcessWatch(context.peers)
            first_revision = context.restarts * _REVISIONS_PER_START
            plane = ControlPlane(spec.cluster, spec.rollout, observer, first_revision=first_revision)
            return ControlServer(plane, context.node)
        case ExpertWorkerSpec():
            return await _make_expert_worker(spec, context, on_contents_change)
        case RouterSpec():
            return await _make_router(spec, context)
        case GatewaySpec():
            return await _make_gateway(spec, context)


async def _make_expert_worker(
    spec: ExpertWorkerSpec, context: ProcessContext, on_contents_change: Callable[[], object]
) -> HostedServer:
    await _import("expert_worker.server")
    from expert_worker.server import WorkerServer

    model = await asyncio.to_thread(find_here, spec.config.model, spec.source)
    config = replace(spec.config, model=model, host=context.node)
    return WorkerServer(config, on_contents_change=on_contents_change)


async def _make_router(spec: RouterSpec, context: ProcessContext) -> HostedServer:
    await _import("router.server")
    from router.control.cluster_watch import ControlWatch
    from router.server import RouterServer

    model = await asyncio.to_thread(find_here, spec.config.model, spec.source)
    config = replace(spec.config, model=model, host=spec.config.host if spec.is_public else context.node)
    view = ControlWatch(lambda: context.peers.address(CONTROLLER))
    return _HostedRouter(RouterServer(config, view), spec.start_timeout_s)


async def _make_gateway(spec: GatewaySpec, context: ProcessContext) -> HostedServer:
    await _import("gateway.server")
    from gateway.server import GatewayServer

    routers = {name: partial(context.peers.address, name) for name in spec.routers}
    return _HostedGateway(GatewayServer(spec.config, routers))


class _HostedRouter:
    """A hosted router. It serves as soon as a real token has passed every layer."""

    loaded_bytes = 0
    total_bytes = 0
    contents_revision = 0

    def __init__(self, server: RouterServer, start_timeout_s: float) -> None:
        self._server = server
        self._start_timeout_s = start_timeout_s

    async def start(self) -> str:
        return await self._server.start()

    async def load(self) -> None:
        await self._server.load()
        await self._server.wait_ready(self._start_timeout_s)

    async def stop(self, drain_s: float) -> None:
        await self._server.stop(drain_s)


class _HostedGateway:
    """A hosted gateway. It serves once it has found a router that serves; until then it answers with 503."""

    loaded_bytes = 0
    total_bytes = 0
    contents_revision = 0

    def __init__(self, server: GatewayServer) -> None:
        self._server = server
        self._address = ""

    async def start(self) -> str:
        self._address = await self._server.start()
        return self._address

    async def load(self) -> None:
        while not await asyncio.to_thread(_is_ready, self._address):
            await asyncio.sleep(READY_PERIOD_S)

    async def stop(self, drain_s: float) -> None:
        await self._server.stop(drain_s)


def _is_ready(address: str) -> bool:
    """Whether the gateway at HOST:PORT answers GET /ready with 200."""
    connection = HTTPConnection(address, timeout=READY_TIMEOUT_S)
    try:
        # A gateway accepts this name wherever it listens.
        connection.request("GET", "/ready", headers={"Host": "localhost"})
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


async def _import(module: str) -> None:
    """Imports in a thread, because torch takes a second, during which the process has to answer."""
    with lasting_imports():
        await asyncio.to_thread(importlib.import_module, module)
