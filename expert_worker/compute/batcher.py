"""One compute thread owns the device; calls wait for it in a bounded queue.

The thread takes the oldest call together with every other waiting call of its layer, so that concurrent callers share
one grouped pass. It reads lanes and direct connections itself and answers from where it computes: no hand-over lies
between such a call and its pass. A full queue refuses at once, a call whose caller stopped waiting is dropped unstarted,
and a failing pass fails its own calls only. A heartbeat from this very thread tells whether the worker still computes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from expert_worker.compute.call import Call
from expert_worker.compute.call_queue import CallQueue, Computed, Ticket
from expert_worker.compute.merge_wait import MergeWait
from expert_worker.compute.poller import Inbox, Source
from moesaic.errors import DeadlineExceeded, InternalError, MoesaicError, Overloaded, Unavailable

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
# Longer than any sound pass: callers give up on one long before.
HANG_LIMIT_S = 60.0
RETRY_AFTER_S = 0.1

ComputeCalls = Callable[[Sequence[Call]], Sequence[Tensor | MoesaicError]]


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Counters since the start. A pass may serve several calls; `busy_s` is the time spent in passes."""

    passes: int = 0
    busy_s: float = 0.0


class Batcher:
    """Computes calls pass by pass, each of one layer and of at most `max_pass_rows` rows, unless one call has more."""

    def __init__(
        self,
        compute_calls: ComputeCalls,
        *,
        max_queued_calls: int,
        max_pass_rows: int,
        max_merge_wait_s: float = 0.0,
        hang_limit_s: float = HANG_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compute_calls = compute_calls
        self._max_queued_calls = max_queued_calls
        self._max_pass_rows = max_pass_rows
        self._hang_limit_s = hang_limit_s
        self._clock = clock
        self._waiting = CallQueue()
        # Both belong to the lock.
        self._merge_wait = MergeWait(max_merge_wait_s)
        self._lock = threading.Lock()
        self._inbox: Inbox
        self._stopping = False
        self._computing = False
        self._heartbeat_s = clock()
        # Since when the thread has time for what it reads itself: what was sent before waited for it.
        self.listening_since_s = self._heartbeat_s
        self._passes = 0
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="expert-compute", daemon=True)

    def start(self) -> None:
        self._inbox = Inbox()
        self._thread.start()

    def attach(self, source: Source) -> None:
        """From now on the compute thread reads this source, and closes it at its end."""
        self._inbox.add(source)

    def detach(self, source: Source) -> None:
        """Call it on the compute thread, before the source closes."""
        self._inbox.remove(source)

    def await_room(self, source: Source, awaited: bool) -> None:
        """Whether the source is also read when it has room to write; on the compute thread."""
        self._inbox.await_room(source, awaited)

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
            self._merge_wait.came(ticket.caller, ticket.call.layer, self._clock())
        if threading.get_ident() != self._thread.ident:
            self._inbox.ring()

    def withdraw(self, ticket: Ticket) -> None:
        """A caller that went away gives its place in the queue free."""
        with self._lock:
            if self._waiting.remove(ticket):
                self._merge_wait.left(ticket.caller, self._clock())

    async def submit(self, call: Call) -> Computed:
        """Waits for the call's output.

        Raises Overloaded when the queue is full, Unavailable after `stop`, DeadlineExceeded when the caller's time is
        over, InvalidArgument for rows that are not finite, InternalError when the pass failed.
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
        """False when the compute thread died, or has work and does not come round."""
        if not self._thread.is_alive():
            return False
        return self.is_idle() or self._clock() - self._heartbeat_s < self._hang_limit_s

    def is_idle(self) -> bool:
        """Whether no call waits or is computed."""
        return not self._computing and not len(self._waiting)

    def stats(self) -> BatcherStats:
        return BatcherStats(self._passes, self._busy_s)

    async def stop(self, timeout_s: float) -> bool:
        """Refuses new calls, fails the waiting ones, and waits for the running pass; False when it does not end."""
        self._stopping = True
        if self._thread.ident is not None:
            self._inbox.ring()
            await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            wait_s = HEARTBEAT_S
            while not self._stopping:
                self._listen(wait_s)
                tickets, wait_s = self._next_pass()
                if tickets:
                    self._compute_pass(tickets)
                    self._computing = False
        finally:
            self._abandon()
            self._inbox.close()

    def _abandon(self) -> None:
        """Fails what waits. On this thread like every answer: what it reads itself belongs to it alone."""
        with self._lock:
            self._stopping = True
            abandoned = self._waiting.clear()
        for ticket in abandoned:
            self._answer_safely(ticket, Unavailable("the worker stops"))

    def _listen(self, wait_s: float) -> None:
        """Takes the calls that the sources bring; waits for the first at most so long."""
        self.listening_since_s = self._heartbeat_s = self._clock()
        for source in self._inbox.wait(wait_s):
            self._read_safely(source)

    def _next_pass(self) -> tuple[list[Ticket], float]:
        """The oldest call and the waiting ones of its layer, or none while it is worth to wait for more of them;
        and how long there is nothing else to do."""
        with self._lock:
            now_s = self._heartbeat_s = self._clock()
            tickets = self._waiting.next_pass(self._max_pass_rows)
            if not tickets:
                return [], HEARTBEAT_S
            wait_s = self._worth_waiting_s(tickets, now_s)
            if wait_s > 0:
                return [], wait_s
            self._waiting.take(tickets)
            self._computing = True
            return tickets, 0.0 if len(self._waiting) else HEARTBEAT_S

    def _worth_waiting_s(self, tickets: Sequence[Ticket], now_s: float) -> float:
        """How long a pass had better wait for other callers. With other layers in the queue it never does."""
        if len(tickets) < len(self._waiting):
            return 0.0
        first = tickets[0]
        callers = {ticket.caller for ticket in tickets}
        return self._merge_wait.until(first.call.layer, callers, first.queued_s, now_s) - now_s

    def _compute_pass(self, tickets: Sequence[Ticket]) -> None:
        start_s = self._clock()
        live: list[Ticket] = []
        for ticket in tickets:
            if ticket.call.deadline_s <= start_s:
                self._answer_safely(ticket, DeadlineExceeded("the caller's time was over in the queue"))
            elif ticket.wanted:
                live.append(ticket)
        outputs = self._compute_safely([ticket.call for ticket in live]) if live else ()
        ended_s = self._clock()
        self._note(tickets, len(live), ended_s - start_s, ended_s)
        for ticket, output in zip(live, outputs, strict=True):
            self._answer_safely(
                ticket,
                output
                if isinstance(output, MoesaicError)
                else Computed(output, start_s - ticket.queued_s, ended_s - start_s, ended_s),
            )

    def _note(self, tickets: Sequence[Ticket], num_calls: int, seconds: float, now_s: float) -> None:
        """Keeps the books of a pass. Before its answers go out: the next calls follow on their heels."""
        if num_calls:
            self._passes += 1
            self._busy_s += seconds
        with self._lock:
            if num_calls:
                self._merge_wait.passed(num_calls, seconds)
            for ticket in tickets:
                self._merge_wait.left(ticket.caller, now_s)

    def _read_safely(self, source: Source) -> None:
        """Whatever goes wrong with a source ends that source, and never this thread."""
        try:
            source.read()
        except Exception:
            log.exception("a source of calls failed")
            source.close()

    def _answer_safely(self, ticket: Ticket, result: Computed | MoesaicError) -> None:
        """Whatever goes wrong with an answer is that caller's loss, and never ends this thread."""
        try:
            ticket.answer(result)
        except Exception:
            log.exception("a call could not be answered", extra={"fields": {"layer": ticket.call.layer}})

    def _compute_safely(self, calls: Sequence[Call]) -> Sequence[Tensor | MoesaicError]:
        """Whatever goes wrong in a pass is logged and answered."""
        try:
            return self._compute_calls(calls)
        except Exception:
            log.exception("a pass failed", extra={"fields": {"layer": calls[0].layer, "calls": len(calls)}})
            return [InternalError("internal error") for _ in calls]


class _AwaitedTicket:
    """A call that a task of the event loop awaits."""

    def __init__(self, call: Call, queued_s: float) -> None:
        self.call = call
        self.caller = id(self)
        self.queued_s = queued_s
        self._loop = asyncio.get_running_loop()
        self.computed: asyncio.Future[Computed] = self._loop.create_future()

    @property
    def wanted(self) -> bool:
        return not self.computed.done()

    def answer(self, result: Computed | MoesaicError) -> None:
        # The loop may have ended together with whoever waited.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: Computed | MoesaicError) -> None:
        if self.computed.done():  # the caller went away
            return
        if isinstance(result, MoesaicError):
            self.computed.set_exception(result)
        else:
            self.computed.set_result(result)
