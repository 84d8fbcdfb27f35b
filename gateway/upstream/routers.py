"""All routers behind the gateway as one: a link to each, the choice among them, and one second chance.

A request that a router has neither answered nor begun to answer may go to another one, once: nobody has seen a token
of it, and expert calls change nothing, so a second run, with or without a seed, is like a first. After its first
message a request ends with its router.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

from gateway.upstream.router_link import ROUTER_UNREACHABLE, ResolveRouter, RouterLink
from gateway.upstream.router_pool import Demand, RouterPool
from moesaic.errors import MoesaicError, Unavailable
from moesaic.v1 import inference_pb2 as pb

# Prompts of one request that are at the routers at once; the others wait here, not in a queue there.
MAX_PARALLEL_PROMPTS = 32

_QUEUED_MESSAGES = 64
# What a router says that another need not say: it is away, it comes, it goes, or it is full.
_ELSEWHERE = frozenset({ROUTER_UNREACHABLE, "LOADING", "DRAINING", "STOPPING", "QUEUE_FULL"})

_Numbered = tuple[int, pb.GenerateResponse]
_Answer = TypeVar("_Answer")


class Routers:
    """Calls to the routers that the resolvers find, by name (HOST:PORT, or MoesaicError while there is none)."""

    def __init__(self, resolvers: Mapping[str, ResolveRouter], *, timeout_s: float) -> None:
        self._links = {
            name: RouterLink(name, resolve, timeout_s=timeout_s) for name, resolve in resolvers.items()
        }
        self._pool = RouterPool(self._links)
        self._timeout_s = timeout_s
        self._closing = False

    @property
    def serving(self) -> bool:
        """Whether any router says that it serves."""
        return any(link.serving for link in self._links.values())

    def start(self) -> None:
        for link in self._links.values():
            link.start()

    async def close(self) -> None:
        """Ends every link, and with Unavailable every call that still runs."""
        self._closing = True
        await asyncio.gather(*(link.close() for link in self._links.values()))

    async def generate(
        self, calls: Sequence[pb.GenerateRequest], request_id: str
    ) -> AsyncGenerator[_Numbered, None]:
        """The messages of all calls as they come, each with the number of its call.

        The first error ends them all; closing the generator cancels what still runs.
        """
        queue: asyncio.Queue[_Numbered | Exception | None] = asyncio.Queue(_QUEUED_MESSAGES)
        places = asyncio.Semaphore(MAX_PARALLEL_PROMPTS)
        pumps = []
        for number, call in enumerate(calls):
            call.request_id = request_id if len(calls) == 1 else f"{request_id[:120]}-{number}"
            pumps.append(asyncio.create_task(self._pump(number, call, places, queue)))
        try:
            num_running = len(pumps)
            while num_running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def tokenize(self, request: pb.TokenizeRequest, request_id: str) -> pb.TokenizeResponse:
        return await self._ask(lambda link: link.tokenize(request, request_id))

    async def detokenize(self, request: pb.DetokenizeRequest, request_id: str) -> pb.DetokenizeResponse:
        return await self._ask(lambda link: link.detokenize(request, request_id))

    async def model_info(self, request_id: str) -> pb.GetModelInfoResponse:
        return await self._ask(lambda link: link.model_info(request_id))

    async def _pump(
        self,
        number: int,
        request: pb.GenerateRequest,
        places: asyncio.Semaphore,
        queue: asyncio.Queue[_Numbered | Exception | None],
    ) -> None:
        """Moves one call's messages into the queue, and then None or the error that ended it."""
        try:
            async with places, aclosing(self._messages(request)) as messages:
                async for message in messages:
                    await queue.put((number, message))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    async def _messages(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer to one call: of the router chosen first, or of a second one that was asked in its place."""
        deadline_s = time.monotonic() + self._timeout_s
        demand = Demand.of(request)
        has_begun = False
        with self._taken(demand, self._candidates()) as first:
            try:
                async with aclosing(first.generate(request, timeout_s=self._timeout_s)) as messages:
                    async for message in messages:
                        has_begun = True
                        yield message
                return
            except MoesaicError as error:
                others = self._others(first, error)
                if has_begun or not others:
                    raise
        with self._taken(demand, others) as second:
            left_s = max(0.0, deadline_s - time.monotonic())
            async with aclosing(second.generate(request, timeout_s=left_s)) as messages:
                async for message in messages:
                    yield message

    async def _ask(self, call: Callable[[RouterLink], Awaitable[_Answer]]) -> _Answer:
        """A short question, to which all routers know the same answer."""
        first = next(iter(self._candidates().values()))
        try:
            return await call(first)
        except MoesaicError as error:
            others = self._others(first, error)
            if not others:
                raise
        return await call(next(iter(others.values())))

    @contextmanager
    def _taken(self, demand: Demand, candidates: Mapping[str, RouterLink]) -> Iterator[RouterLink]:
        """The router for a request, which counts as its load meanwhile."""
        name = self._pool.take(demand, candidates)
        try:
            yield candidates[name]
        finally:
            self._pool.release(name, demand)

    def _candidates(self) -> Mapping[str, RouterLink]:
        """Those that serve; when none does, those that can tell why. Raises Unavailable when none can be asked."""
        candidates = self._serving() or {name: link for name, link in self._links.items() if link.connected}
        if not candidates:
            raise Unavailable("no router has been found yet", reason="NO_ROUTER")
        return candidates

    def _others(self, asked: RouterLink, error: MoesaicError) -> Mapping[str, RouterLink]:
        """Those that might do better after this error."""
        if self._closing or error.reason not in _ELSEWHERE:
            return {}
        return {name: link for name, link in self._serving().items() if link is not asked}

    def _serving(self) -> dict[str, RouterLink]:
        return {name: link for name, link in self._links.items() if link.serving}
