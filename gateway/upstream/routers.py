"""All routers behind the gateway: a link to each, the choice between them, and what becomes of a request whose router
refuses or is lost.

A request that its router refuses is sent to another one, once. A request whose router is lost goes on at another
router, or at the same one when it is back: before its first token it begins again, which is as good, since nobody
has seen any of it and expert calls have no side effects; after that the next router goes on behind the tokens that
have arrived (moesaic/client/received_answer.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

from gateway.upstream.load_balancer import Demand, LoadBalancer
from gateway.upstream.router_link import ResolveRouter, RouterLink
from moesaic.client.attempts import NO_ROUTER, Attempts, is_lost, is_refusal
from moesaic.client.received_answer import ReceivedAnswer
from moesaic.errors import MoesaicError, Unavailable
from moesaic.v1 import inference_pb2 as pb

log = logging.getLogger(__name__)

# The most prompts of one request that are sent to routers at once. The others wait here, not in a router's
# queue.
MAX_PARALLEL_PROMPTS = 32

_QUEUED_MESSAGES = 64
_Numbered = tuple[int, pb.GenerateResponse]
_R = TypeVar("_R")


class Routers:
    """Calls to the routers that the resolvers find.

    Each resolver returns HOST:PORT, or raises MoesaicError while its router has no address.
    """

    def __init__(self, resolvers: Mapping[str, ResolveRouter], *, timeout_s: float) -> None:
        self._links = {
            name: RouterLink(name, resolve, timeout_s=timeout_s, on_health=self._note_health)
            for name, resolve in resolvers.items()
        }
        self._balancer = LoadBalancer(self._links)
        self._timeout_s = timeout_s
        self._closing = False
        # Set while a router serves, and when all is closing: whoever waits for a router looks again.
        self._may_serve = asyncio.Event()

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
        self._may_serve.set()
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
        """The messages of one call, from as many routers as it takes."""
        demand, course = Demand.of(request), _Course(request, self._timeout_s)
        candidates = self._candidates()
        course.awaits = bool(self._serving())
        while not course.answer.complete:
            with self._taken(demand, candidates) as link:
                try:
                    async with aclosing(self._part(link, course)) as messages:
                        async for message in messages:
                            yield message
                    return
                except MoesaicError as error:
                    failure = error
            candidates = await self._next(link, course, failure)
            fields = {
                "request_id": request.request_id,
                "tokens": course.answer.num_tokens,
                "reason": failure.reason,
            }
            log.info("a request goes on at another router", extra={"fields": fields})

    async def _part(self, link: RouterLink, course: _Course) -> AsyncGenerator[pb.GenerateResponse, None]:
        """What one router gives of an answer."""
        request, timeout_s = course.answer.next_request(), course.attempts.time_left_s
        async with aclosing(link.generate(request, timeout_s=timeout_s)) as messages:
            async for message in messages:
                course.take(message)
                yield message

    async def _next(
        self, asked: RouterLink, course: _Course, failure: MoesaicError
    ) -> Mapping[str, RouterLink]:
        """The routers that may take a request after `asked` failed. Raises `failure` if none may."""
        if self._closing or not course.may_go_on(failure):
            raise failure
        delay_s = course.attempts.delay_after_loss(failure)
        if delay_s is None:
            raise failure
        course.failed.append(asked)
        others = {name: link for name, link in self._serving().items() if link not in course.failed}
        if others:
            return others
        course.failed.clear()
        returned = await self._serving_again(delay_s, course.attempts) if course.awaits_after(failure) else {}
        if self._closing:
            raise Unavailable("the gateway is stopping", reason="STOPPING") from failure
        if not returned:
            raise failure
        return returned

    async def _serving_again(self, delay_s: float, attempts: Attempts) -> Mapping[str, RouterLink]:
        """The routers that serve after the delay, or as soon as one does; none if the time is over before."""
        await asyncio.sleep(delay_s)
        try:
            async with asyncio.timeout(attempts.time_left_s):
                await self._may_serve.wait()
        except TimeoutError:
            return {}
        return self._serving()

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
            raise Unavailable("no router has been found yet", reason=NO_ROUTER)
        return candidates

    def _others(self, asked: RouterLink, error: MoesaicError) -> Mapping[str, RouterLink]:
        """The serving routers that may succeed where `asked` failed with `error`."""
        if self._closing or not (is_lost(error) or is_refusal(error)):
            return {}
        return {name: link for name, link in self._serving().items() if link is not asked}

    def _note_health(self) -> None:
        if self._serving() or self._closing:
            self._may_serve.set()
        else:
            self._may_serve.clear()

    def _serving(self) -> dict[str, RouterLink]:
        return {name: link for name, link in self._links.items() if link.serving}


class _Course:
    """How far one call has come, over all the routers that it was sent to."""

    def __init__(self, request: pb.GenerateRequest, timeout_s: float) -> None:
        self.answer = ReceivedAnswer(request)
        self.attempts = Attempts(timeout_s, retries=True)
        # The routers that have failed since the last message.
        self.failed: list[RouterLink] = []
        # Whether a lost router is awaited: not if none served when the call came.
        self.awaits = False
        self._is_refused = False

    def take(self, message: pb.GenerateResponse) -> None:
        self.answer.take(message)
        self.attempts.note_answer()
        self.failed.clear()

    def may_go_on(self, failure: MoesaicError) -> bool:
        """Whether another router may be asked after this failure."""
        if is_lost(failure):
            return True
        is_first, self._is_refused = not self._is_refused, True
        return is_refusal(failure) and (is_first or self.answer.begun)

    def awaits_after(self, failure: MoesaicError) -> bool:
        """Whether a router is awaited where no other one serves."""
        return self.awaits and (is_lost(failure) or self.answer.begun)
