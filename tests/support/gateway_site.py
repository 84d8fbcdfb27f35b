"""A gateway in front of a fake router, on real sockets, and what its clients do with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from support.fake_router import FakeRouter, RunningRouter, running

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from moesaic import errors
from moesaic.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway in front of a fake router."""

    router: FakeRouter
    link: RunningRouter
    gateway: GatewayServer
    address: str

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, "timeout": 60, **options}
        )


@contextlib.asynccontextmanager
async def gateway_for(
    address: str | None, *, host: str = "127.0.0.1", settings: GatewaySettings | None = None
) -> AsyncIterator[tuple[GatewayServer, str]]:
    async def resolve_router() -> str:
        if address is None:
            raise errors.Unavailable("no router yet")
        return address

    settings = settings or GatewaySettings(max_body_mib=1)
    gateway = GatewayServer(GatewayConfig(host, 0, settings), {"router": resolve_router})
    listening = await gateway.start()
    try:
        yield gateway, listening
    finally:
        await gateway.stop(0)


@contextlib.asynccontextmanager
async def running_site() -> AsyncIterator[Site]:
    async with (
        running(FakeRouter()) as link,
        gateway_for(link.address) as (gateway, address),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as http,
    ):
        await until_status(http, "/ready", 200)
        yield Site(link.router, link, gateway, address)


async def until_status(http: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    deadline = time.monotonic() + 60.0
    while (response := await http.get(path)).status_code != status:
        assert time.monotonic() < deadline, f"{path} still answers {response.status_code}"
        await asyncio.sleep(0.02)
    return response


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.01)


def request_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the log lines about POST requests."""
    lines = [vars(record)["fields"] for record in caplog.records if record.message == "request"]
    return [fields for fields in lines if fields["method"] == "POST"]


def events(text: str) -> list[Any]:
    """The data of each event of a stream; [DONE] as that string."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
