"""The calls of one grpcio stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.compute.call_queue import Computed
from expert_worker.serving.call_handler import AcceptedCall, CallHandler, Request, Response
from moesaic.errors import DeadlineExceeded, MoesaicError


class CallStream:
    """Reads calls and yields their answers; at most `limit` calls are read and not answered at a time."""

    def __init__(self, handler: CallHandler, batcher: Batcher, limit: int) -> None:
        self._handler = handler
        self._batcher = batcher
        self._capacity = asyncio.Semaphore(limit)
        self._in_flight: set[StreamTicket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        # Bounded by `limit`; None ends the stream.
        self._responses: asyncio.Queue[Response | None] = asyncio.Queue()

    async def responses(self, requests: AsyncIterator[Request]) -> AsyncGenerator[Response, None]:
        """The answers as they become ready, until the caller has ended its side and has all of them."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._responses.get()) is not None:
                yield response
                self._capacity.release()
            if reader.done():
                await reader
        finally:
            reader.cancel()
            for ticket in list(self._in_flight):
                self._drop(ticket)

    async def answered(self) -> None:
        """Returns when the response of every call accepted so far is queued."""
        await self._idle.wait()

    def end(self) -> None:
        """Makes `responses` end after those that are queued."""
        self._responses.put_nowait(None)

    def settle(self, ticket: StreamTicket, result: Computed | MoesaicError) -> None:
        """Answers a call once. Of its result and the end of its timeout, only the first has an effect."""
        if ticket in self._in_flight:
            self._forget(ticket)
            self._responses.put_nowait(self._handler.answer(ticket.accepted, result))

    def expire(self, ticket: StreamTicket) -> None:
        """Answers a call whose timeout has ended."""
        self._batcher.withdraw(ticket)
        self.settle(ticket, DeadlineExceeded("the caller's time is over"))

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                await self._capacity.acquire()
                self._begin(request)
            await self.answered()
        finally:
            self.end()

    def _begin(self, request: Request) -> None:
        accepted = self._handler.accept(request)
        if not isinstance(accepted, AcceptedCall):
            self._responses.put_nowait(accepted)
            return
        ticket = StreamTicket(self, accepted)
        self._in_flight.add(ticket)
        self._idle.clear()
        try:
            self._batcher.offer(ticket)
        except MoesaicError as error:
            self.settle(ticket, error)

    def _drop(self, ticket: StreamTicket) -> None:
        """Drops a call whose caller is gone."""
        self._forget(ticket)
        self._batcher.withdraw(ticket)
        self._handler.drop(ticket.accepted)

    def _forget(self, ticket: StreamTicket) -> None:
        ticket.wanted = False
        ticket.timer.cancel()
        self._in_flight.discard(ticket)
        if not self._in_flight:
            self._idle.set()


class StreamTicket:
    """A call of a stream. Its answer goes back to the event loop."""

    def __init__(self, stream: CallStream, accepted: AcceptedCall) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self.accepted = accepted
        self.wanted = True
        # Answers the caller at its deadline even when the compute thread hangs.
        self.timer = self._loop.call_at(accepted.call.deadline_s, stream.expire, self)

    @property
    def call(self) -> ExpertCall:
        return self.accepted.call

    @property
    def queued_s(self) -> float:
        return self.accepted.accepted_s

    def answer(self, result: Computed | MoesaicError) -> None:
        # The loop may have ended together with the stream.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stream.settle, self, result)
