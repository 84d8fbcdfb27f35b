"""Calls over a stream of grpcio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.compute.call_queue import Computed
from expert_worker.serving.call_handler import CallDesk, OpenCall, Request, Response
from moesaic.errors import DeadlineExceeded, MoesaicError


class CallStream:
    """The calls of one stream: at most `limit` of them are read and not yet written back."""

    def __init__(self, desk: CallDesk, batcher: Batcher, limit: int) -> None:
        self._desk = desk
        self._batcher = batcher
        self._places = asyncio.Semaphore(limit)
        self._in_flight: set[StreamTicket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        # Bounded by the places; None ends the stream.
        self._responses: asyncio.Queue[Response | None] = asyncio.Queue()

    async def responses(self, requests: AsyncIterator[Request]) -> AsyncGenerator[Response, None]:
        """Answers in the order in which they are ready, until the caller has ended its side and has them all."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._responses.get()) is not None:
                yield response
                self._places.release()
            if reader.done():
                await reader
        finally:
            reader.cancel()
            for ticket in list(self._in_flight):
                self._drop(ticket)

    async def answered(self) -> None:
        """Returns when every call taken so far has its response queued."""
        await self._idle.wait()

    def end(self) -> None:
        """Lets `responses` end after the responses that are queued."""
        self._responses.put_nowait(None)

    def settle(self, ticket: StreamTicket, result: Computed | MoesaicError) -> None:
        """Answers a call once: what comes second, the result or the end of the caller's time, changes nothing."""
        if ticket in self._in_flight:
            self._forget(ticket)
            self._responses.put_nowait(self._desk.answer(ticket.taken, result))

    def expire(self, ticket: StreamTicket) -> None:
        """The caller's time is over."""
        self._batcher.withdraw(ticket)
        self.settle(ticket, DeadlineExceeded("the caller's time is over"))

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                await self._places.acquire()
                self._begin(request)
            await self.answered()
        finally:
            self.end()

    def _begin(self, request: Request) -> None:
        taken = self._desk.take(request)
        if not isinstance(taken, OpenCall):
            self._responses.put_nowait(taken)
            return
        ticket = StreamTicket(self, taken)
        self._in_flight.add(ticket)
        self._idle.clear()
        try:
            self._batcher.offer(ticket)
        except MoesaicError as error:
            self.settle(ticket, error)

    def _drop(self, ticket: StreamTicket) -> None:
        """Its caller went away."""
        self._forget(ticket)
        self._batcher.withdraw(ticket)
        self._desk.drop(ticket.taken)

    def _forget(self, ticket: StreamTicket) -> None:
        ticket.wanted = False
        ticket.timer.cancel()
        self._in_flight.discard(ticket)
        if not self._in_flight:
            self._idle.set()


class StreamTicket:
    """A call of a stream: its answer goes back to the event loop."""

    def __init__(self, stream: CallStream, taken: OpenCall) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self.taken = taken
        self.wanted = True
        # The caller hears of the end of its time even from a worker that hangs.
        self.timer = self._loop.call_at(taken.call.deadline_s, stream.expire, self)

    @property
    def call(self) -> ExpertCall:
        return self.taken.call

    @property
    def queued_s(self) -> float:
        return self.taken.taken_s

    def answer(self, result: Computed | MoesaicError) -> None:
        # The loop may have ended together with whoever waited.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stream.settle, self, result)
