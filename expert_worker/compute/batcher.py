"""The compute thread, which owns the device, and the bounded queue of calls before it.

The thread takes the oldest call together with every other waiting call of its layer, so that concurrent
callers share one grouped pass. It reads shared memory and direct streams itself and answers where it
computes, so that no hand-over between threads lies between such a call and its pass. A full queue refuses a
call at once, a call whose caller stopped waiting is dropped before it starts, and a failing pass fails only
its own calls. The thread's heartbeat shows whether the worker still computes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from expert_worker.compute.call import ExpertCall
from expert_worker.compute.call_queue import CallQueue, Computed, Ticket
from expert_worker.compute.poller import Poller, Source
from moesaic.errors import DeadlineExceeded, InternalError, MoesaicError, Overloaded, Unavailable

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
# Longer than any sound pass takes: callers give up long before.
HANG_LIMIT_S = 60.0
RETRY_AFTER_S = 0.1

ComputeCalls = Callable[[Sequence[ExpertCall]], Sequence[Tensor | MoesaicError]]


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Counters since the start. A pass may serve several calls; `busy_s` is the time spent in passes."""

    passes: int = 0
    busy_s: float = 0.0


class Batcher:
    """Computes calls in passes of one layer and of at most `max_pass_rows` rows, unless one call has more."""

    def __init__(
        self,
        compute_calls: ComputeCalls,
        *,
        max_queued_calls: int,
        max_pass_rows: int,
        hang_limit_s: float = HANG_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compute_calls = compute_calls
        self._max_queued_calls = max_queued_calls
        self._max_pass_rows = max_pass_rows
        self._hang_limit_s = hang_limit_s
        self._clock = clock
        self._waiting = CallQueue()
        # Guards the queue.
        self._lock = threading.Lock()
        self._poller: Poller
        self._stopping = False
        self._computing = False
        self._heartbeat_s = clock()
        # Since when the thread has time for what it reads itself. What was sent earlier has waited for the
        # thread.
        self.listening_since_s = self._heartbeat_s
        self._passes = 0
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="expert-compute", daemon=True)

    def start(self) -> None:
        self._poller = Poller()
        self._thread.start()

    def attach(self, source: Source) -> None:
        """From now on the compute thread reads this source; it closes the source when the thread ends."""
        self._poller.add(source)

    def detach(self, source: Source) -> None:
        """Must be called on the compute thread, before the source closes."""
        self._poller.remove(source)

    def await_room(self, source: Source, awaited: bool) -> None:
        """Sets whether the source is also read when it has room to write. For the compute thread only."""
        self._poller.await_room(source, awaited)

    def offer(self, ticket: Ticket) -> None:
        """Queues a call. Raises Overloaded when the queue is full and Unavailable after `stop`."""
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise Unavailable("the worker does not compute", retry_after_s=RETRY_AFTER_S)
            if len(self._waiting) >= self._max_queued_calls:
                raise Overloaded(
                    f"{self._max_queued_calls} calls are waiting already", retry_after_s=RETRY_AFTER_S
                )
            self._waiting.add(ticket)
        if threading.get_ident() != self._thread.ident:
            self._poller.wake()

    def withdraw(self, ticket: Ticket) -> None:
        """Frees the place in the queue of a caller that went away."""
        with self._lock:
            self._waiting.remove(ticket)

    async def submit(self, call: ExpertCall) -> Computed:
        """Queues a call and waits for its output.

        Raises Overloaded when the queue is full, Unavailable after `stop`, DeadlineExceeded when the caller's
        time is over, InvalidArgument for rows that are not finite, InternalError when the pass failed.
        """
        ticket = _AwaitedTicket(call, self._clock())
        self.offer(ticket)
        try:
            async with asyncio.timeout_at(call.deadline_s):
                return await ticket.computed
        except TimeoutError:
            raise DeadlineExceeded("the caller's time is over") from None
        finally:
            self.withdraw(ticket)

    def is_healthy(self) -> bool:
        """False when the compute thread died, or has work and has shown no heartbeat for too long."""
        if not self._thread.is_alive():
            return False
        return self.is_idle() or self._clock() - self._heartbeat_s < self._hang_limit_s

    def is_idle(self) -> bool:
        """Whether no call waits or is being computed."""
        return not self._computing and not len(self._waiting)

    def stats(self) -> BatcherStats:
        return BatcherStats(self._passes, self._busy_s)

    async def stop(self, timeout_s: float) -> bool:
        """Refuses new calls, fails waiting ones and awaits the running pass; False if that does not end."""
        self._stopping = True
        if self._thread.ident is not None:
            self._poller.wake()
            await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._listen(0.0 if len(self._waiting) else HEARTBEAT_S)
                self._compute_next()
        finally:
            self._abandon()
            self._poller.close()

    def _compute_next(self) -> None:
        """Computes the next pass, if calls wait. When it returns, nothing refers to their experts any more."""
        if tickets := self._take_pass():
            self._compute_pass(tickets)
            self._computing = False

    def _abandon(self) -> None:
        """Fails the waiting calls, like every answer on the compute thread, which owns its sources."""
        with self._lock:
            self._stopping = True
            abandoned = self._waiting.clear()
        for ticket in abandoned:
            self._answer_safely(ticket, Unavailable("the worker stops"))

    def _listen(self, timeout_s: float) -> None:
        """Takes the calls that the sources bring; waits for the first one at most `timeout_s`."""
        self.listening_since_s = self._heartbeat_s = self._clock()
        for source in self._poller.wait(timeout_s):
            self._read_safely(source)

    def _take_pass(self) -> list[Ticket]:
        """The oldest call and the waiting ones of its layer; empty when no call waits."""
        with self._lock:
            self._heartbeat_s = self._clock()
            tickets = self._waiting.take_pass(self._max_pass_rows)
            self._computing = bool(tickets)
            return tickets

    def _compute_pass(self, tickets: Sequence[Ticket]) -> None:
        start_s = self._clock()
        live = self._drop_late(tickets, start_s)
        if not live:
            return
        outputs = self._compute_safely([ticket.call for ticket in live])
        ended_s = self._clock()
        # Counted before the answers go out: a caller that has its answer may ask for the statistics at once.
        self._passes += 1
        self._busy_s += ended_s - start_s
        for ticket, output in zip(live, outputs, strict=True):
            self._answer_safely(
                ticket,
                output
                if isinstance(output, MoesaicError)
                else Computed(output, start_s - ticket.queued_s, ended_s - start_s, ended_s),
            )

    def _drop_late(self, tickets: Sequence[Ticket], now_s: float) -> list[Ticket]:
        """The tickets whose callers still wait. Those whose time is over are answered with an error."""
        live: list[Ticket] = []
        for ticket in tickets:
            if ticket.call.deadline_s <= now_s:
                self._answer_safely(ticket, DeadlineExceeded("the caller's time was over in the queue"))
            elif ticket.wanted:
                live.append(ticket)
        return live

    def _read_safely(self, source: Source) -> None:
        """An error of a source ends that source, never this thread."""
        try:
            source.read()
        except Exception:
            log.exception("a source of calls failed")
            source.close()

    def _answer_safely(self, ticket: Ticket, result: Computed | MoesaicError) -> None:
        """An error while answering is logged and costs that caller its answer; it never ends this thread."""
        try:
            ticket.answer(result)
        except Exception:
            log.exception("a call could not be answered", extra={"fields": {"layer": ticket.call.layer}})

    def _compute_safely(self, calls: Sequence[ExpertCall]) -> Sequence[Tensor | MoesaicError]:
        """An error in a pass is logged, and answered to its callers."""
        try:
            return self._compute_calls(calls)
        except Exception:
            log.exception("a pass failed", extra={"fields": {"layer": calls[0].layer, "calls": len(calls)}})
            return [InternalError("internal error") for _ in calls]


class _AwaitedTicket:
    """A call that a task of the event loop awaits."""

    def __init__(self, call: ExpertCall, queued_s: float) -> None:
        self.call = call
        self.queued_s = queued_s
        self._loop = asyncio.get_running_loop()
        self.computed: asyncio.Future[Computed] = self._loop.create_future()

    @property
    def wanted(self) -> bool:
        return not self.computed.done()

    def answer(self, result: Computed | MoesaicError) -> None:
        # The loop may have ended together with the task that waited.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: Computed | MoesaicError) -> None:
        if self.computed.done():  # the caller went away
            return
        if isinstance(result, MoesaicError):
            self.computed.set_exception(result)
        else:
            self.computed.set_result(result)
