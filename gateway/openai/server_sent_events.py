"""Server-sent events. When the client disconnects, the calls to the router are cancelled at once.

The status line is sent with the first token. An error after it is the last event of the stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from moesaic.errors import Cancelled

log = logging.getLogger(__name__)

DONE = format_sse_event(data_str="[DONE]")

_R = TypeVar("_R")


def event(body: BaseModel) -> bytes:
    return format_sse_event(data_str=body.model_dump_json(exclude_unset=True))


def error_event(envelope: dict[str, Any], num_tokens: int) -> bytes:
    """The envelope of an error, and the number of tokens that preceded it."""
    return format_sse_event(data_str=json.dumps({**envelope, "offset": num_tokens}))


class EventStream(EventSourceResponse):
    """Sends events as they arrive. Closes their source when the client disconnects or exceeds `timeout_s`."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, source: AsyncGenerator[Any, None], timeout_s: float
    ) -> None:
        # These headers keep proxies from buffering tokens.
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._source = source
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._source), asyncio.timeout(self._timeout_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client did not read its stream to the end")


async def unless_gone(request: Request, work: Awaitable[_R]) -> _R:
    """The result of `work`. Cancels it and raises Cancelled when the client disconnects first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("the client went away")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
