"""Bytes that are no message of the call are an error for everyone who asks over asyncio, where grpc gives None for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from cluster.bundles.controller_client import controller_client, find_controller
from cluster.control.golden_prompts import measure_drift
from cluster.observation.observer import Observer
from moesaic import rpc
from moesaic.errors import DataLoss
from moesaic.v1 import control_pb2


async def history(address: str) -> None:
    async with controller_client(address) as client:
        await client.history(limit=1)


async def change(address: str) -> None:
    async with controller_client(address) as client:
        await client.carry_out(control_pb2.ChangeRequest())


async def drift(address: str) -> None:
    await measure_drift(address, ["a text"], ("old", "new"))


async def observe(address: str) -> None:
    async with Observer(address) as observer:
        await observer.observe()


@asynccontextmanager
async def garbling() -> AsyncIterator[str]:
    """HOST:PORT of a server that answers every call with the same bytes."""

    async def answer(request: bytes, context: Any) -> bytes:
        return b"\xff"

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"\xff"

    once = dict.fromkeys(("GetModelInfo", "GetHistory"), grpc.unary_unary_rpc_method_handler(answer))
    often = dict.fromkeys(("Generate", "Change"), grpc.unary_stream_rpc_method_handler(stream))
    services = {}
    for service in (rpc.INFERENCE_SERVICE, rpc.CONTROL_SERVICE):
        handler = grpc.method_handlers_generic_handler(service, {**once, **often})
        services[service] = lambda server, handler=handler: server.add_generic_rpc_handlers((handler,))
    server = rpc.Server(services)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.mark.parametrize("ask", [find_controller, history, change, drift, observe])
async def test_an_answer_that_is_no_message_is_lost_data(ask: Callable[[str], Awaitable[object]]) -> None:
    async with garbling() as address:
        with pytest.raises(DataLoss, match="no message of this call"):
            await ask(address)
