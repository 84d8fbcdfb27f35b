"""The HTTP server: it binds at once, answers 503 until a router serves, and drains before it stops."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import uvicorn

from gateway.app import build_app
from gateway.config import GatewayConfig
from gateway.cors import Cors
from gateway.edge import Edge
from gateway.http_protocol import StrictProtocol
from gateway.upstream.router_link import ResolveRouter
from gateway.upstream.routers import Routers
from moesaic.addresses import is_loopback, join_address
from moesaic.errors import InvalidArgument, Unavailable

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# Clients keep idle connections for less time than this, so that they close first and never write to a closed
# one.
_KEEP_ALIVE_S = 75
_START_TIMEOUT_S = 10.0
# After the drain, the time in which requests that were cut off send their last bytes.
_FINAL_FLUSH_S = 2.0
_BACKLOG = 1024


class GatewayServer:
    """HTTP in front of the routers that the resolvers find.

    Each resolver returns HOST:PORT, or raises MoesaicError while its router has no address.
    """

    def __init__(self, config: GatewayConfig, resolvers: Mapping[str, ResolveRouter]) -> None:
        self._config = config
        self._routers = Routers(resolvers, timeout_s=config.settings.request_timeout_s)
        self._http = _Uvicorn(_uvicorn_config(config, self._routers))
        self._serving: asyncio.Task[None] | None = None

    @property
    def serving_routers(self) -> frozenset[str]:
        """The names of the routers whose health is SERVING."""
        return self._routers.serving

    async def start(self) -> str:
        """Returns HOST:PORT (for port 0, a free one). Raises InvalidArgument when the port is taken."""
        listener = _listen(self._config.host, self._config.port)
        self._serving = asyncio.create_task(self._http.serve(sockets=[listener]), name="gateway-http")
        self._routers.start()
        try:
            await self._started(self._serving)
        except BaseException:
            await self.stop(0)
            raise
        return join_address(self._config.host, listener.getsockname()[1])

    async def _started(self, serving: asyncio.Task[None]) -> None:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not self._http.started:
                if serving.done():
                    raise Unavailable("the HTTP server ended while it started")
                await asyncio.sleep(0.005)

    async def stop(self, drain_s: float) -> None:
        """Refuses new connections. Running requests have `drain_s` seconds, and then end with an error."""
        if self._serving is None:
            return
        self._http.config.timeout_graceful_shutdown = math.ceil(drain_s + _FINAL_FLUSH_S)
        self._http.should_exit = True
        await asyncio.wait({self._serving}, timeout=drain_s)
        await self._routers.close()
        await self.wait()

    async def wait(self) -> None:
        """Returns when the server has ended."""
        if self._serving is not None:
            await asyncio.shield(self._serving)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, because the process's main program handles signals."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _uvicorn_config(config: GatewayConfig, routers: Routers) -> uvicorn.Config:
    max_body_bytes = config.settings.max_body_mib << 20
    app = build_app(routers, max_body_bytes=max_body_bytes, timeout_s=config.settings.request_timeout_s)
    return uvicorn.Config(
        Edge(
            app,
            max_body_bytes=max_body_bytes,
            allowed_hosts=_allowed_hosts(config),
            cors=Cors(frozenset(config.settings.allowed_origins)),
        ),
        http=StrictProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        reset_contextvars=True,
    )


def _allowed_hosts(config: GatewayConfig) -> frozenset[str] | None:
    """The accepted values of the Host header; None accepts any."""
    named = frozenset(name.lower() for name in config.settings.allowed_hosts)
    if is_loopback(config.host):
        return _LOCAL_NAMES | {config.host.lower()} | named
    return named | _LOCAL_NAMES if named else None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port) from error
    listener.setblocking(False)
    return listener


def _cannot_listen(host: str, port: int) -> InvalidArgument:
    return InvalidArgument(
        f"cannot listen on {join_address(host, port)}: the port is in use or the host is not this machine's",
        field="port",
        reason="PORT_IN_USE",
    )
