"""All routers behind the gateway: a link to each, the choice between them, and one retry.

A request whose router fails before its first message is sent to another router, once. This is safe because
the client has not received a token and expert calls have no side effects, so the second run is equivalent to
a first, with or without a seed. After the first message, the failure of the router ends the request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

from gateway.upstream.load_balancer import Demand, LoadBalancer
from gateway.upstream.router_link import ROUTER_UNREACHABLE, ResolveRouter, RouterLink
from moesaic.errors import MoesaicError, Unavailable
from moesaic.v1 import inference_pb2 as pb

# The most prompts of one request that are sent to routers at once. The others wait here, not in a router's
# queue.
MAX_PARALLEL_PROMPTS = 32

_QUEUED_MESSAGES = 64
# Reasons that concern one router alone, so that another may accept the request: it is unreachable, starts,
# stops or is full, or does not hold the epoch (yet, or any more) that the request needs.
_RETRY_ELSEWHERE = frozenset(
    {ROUTER_UNREACHABLE, "LOADING", "DRAINING", "STOPPING", "QUEUE_FULL", "EPOCH_UNKNOWN", "EXPERTS_MISSING"}
)

_Numbered = tuple[int, pb.GenerateResponse]
_R = TypeVar("_R")


class Routers:
    """Calls to the routers that the resolvers find.

    Each resolver returns HOST:PORT, or raises MoesaicError while its router has no address.
    """

    def __init__(self, resolvers: Mapping[str, ResolveRouter], *, timeout_s: float) -> None:
        self._links = {
            name: RouterLink(name, resolve, timeout_s=timeout_s) for name, resolve in resolvers.items()
        }
        self._balancer = LoadBalancer(self._links)
        self._timeout_s = timeout_s
        self._closing = False

    @property
    def serving(self) -> frozenset[str]:
        """The names of the routers whose health is SERVING."""
        return frozenset(self._serving())

    def start(self) -> None:
        for link in self._links.values():
            link.start()

    async def close(self) -> None:
        """Closes every link. Calls that still run fail with Unavailable."""
        self._closing = True
        await asyncio.gather(*(link.close() for link in self._links.values()))

    async def generate(
        self, calls: Sequence[pb.GenerateRequest], request_id: str
    ) -> AsyncGenerator[_Numbered, None]:
        """Streams the messages of all calls, each with the number of its call.

        The first error ends all calls. Closing the generator cancels those that still run.
        """
        queue: asyncio.Queue[_Numbered | Exception | None] = asyncio.Queue(_QUEUED_MESSAGES)
        limit = asyncio.Semaphore(MAX_PARALLEL_PROMPTS)
        pumps = []
        for number, call in enumerate(calls):
            call.request_id = request_id if len(calls) == 1 else f"{request_id[:120]}-{number}"
            # The prompts of one request are on the same side of a canary.
            call.session_id = call.session_id or request_id
            pumps.append(asyncio.create_task(self._pump(number, call, limit, queue)))
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
        limit: asyncio.Semaphore,
        queue: asyncio.Queue[_Numbered | Exception | None],
    ) -> None:
        """Puts the messages of one call into the queue, then None or the error that ended the call."""
        try:
            async with limit, aclosing(self._messages(request)) as messages:
                async for message in messages:
                    await queue.put((number, message))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    async def _messages(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The messages of one call, from the first chosen router or from a second one in its place."""
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

    async def _ask(self, call: Callable[[RouterLink], Awaitable[_R]]) -> _R:
        """A unary call to which every router gives the same answer."""
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
        """Chooses the router of a request, which counts as its load inside the context."""
        name = self._balancer.take(demand, candidates)
        try:
            yield candidates[name]
        finally:
            self._balancer.release(name, demand)

    def _candidates(self) -> Mapping[str, RouterLink]:
        """The serving routers, or else every connected one, whose error says why it does not serve.

        Raises Unavailable when no router has an address.
        """
        candidates = self._serving() or {name: link for name, link in self._links.items() if link.connected}
        if not candidates:
            raise Unavailable("no router has been found yet", reason="NO_ROUTER")
        return candidates

    def _others(self, asked: RouterLink, error: MoesaicError) -> Mapping[str, RouterLink]:
        """The serving routers that may succeed where `asked` failed with `error`."""
        if self._closing or error.reason not in _RETRY_ELSEWHERE:
            return {}
        return {name: link for name, link in self._serving().items() if link is not asked}

    def _serving(self) -> dict[str, RouterLink]:
        return {name: link for name, link in self._links.items() if link.serving}
