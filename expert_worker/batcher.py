"""One compute thread owns the device; calls wait for it in a bounded queue.

The thread takes the oldest call together with every other waiting call of its layer, so that concurrent callers share
one grouped pass. A full queue refuses at once, a call whose caller stopped waiting is dropped unstarted, and a failing
pass fails its own calls only. A heartbeat from this very thread tells whether the worker still computes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from expert_worker.call import Call
from moesaic.errors import DeadlineExceeded, InternalError, MoesaicError, Overloaded, Unavailable

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
# Longer than any sound pass: callers give up on one long before.
HANG_LIMIT_S = 60.0
RETRY_AFTER_S = 0.1

ComputeCalls = Callable[[Sequence[Call]], Sequence[Tensor | MoesaicError]]


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A call's output and where its time went."""

    output: Tensor
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Counters since the start. A pass may serve several calls; `busy_s` is the time spent in passes."""

    passes: int = 0
    busy_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Ticket:
    """A call in the queue and who waits for it."""

    call: Call
    answer: asyncio.Future[Computed]
    queued_s: float


_Results = Sequence[tuple[_Ticket, Computed | MoesaicError]]


class Batcher:
    """Computes calls pass by pass, each of one layer and of at most `max_pass_rows` rows, unless one call has more."""

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
        self._waiting: deque[_Ticket] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._computing = False
        self._heartbeat_s = clock()
        self._passes = 0
        self._busy_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="expert-compute", daemon=True)

    def start(self) -> None:
        """Call it in the event loop that `submit` will be awaited in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, call: Call) -> Computed:
        """Waits for the call's output.

        Raises Overloaded when the queue is full, Unavailable after `stop`, DeadlineExceeded when the caller's time is
        over, InvalidArgument for rows that are not finite, InternalError when the pass failed.
        """
        ticket = _Ticket(call, asyncio.get_running_loop().create_future(), self._clock())
        self._queue(ticket)
        try:
            async with asyncio.timeout_at(call.deadline_s):
                return await ticket.answer
        except TimeoutError:
            raise DeadlineExceeded("the caller's time is over") from None
        finally:
            self._unqueue(ticket)

    def is_healthy(self) -> bool:
        """False when the compute thread died, or has work and does not come round."""
        if not self._thread.is_alive():
            return False
        has_work = self._computing or bool(self._waiting)
        return not has_work or self._clock() - self._heartbeat_s < self._hang_limit_s

    def stats(self) -> BatcherStats:
        return BatcherStats(self._passes, self._busy_s)

    async def stop(self, timeout_s: float) -> bool:
        """Refuses new calls, fails the waiting ones, and waits for the running pass; False when it does not end."""
        with self._changed:
            self._stopping = True
            abandoned = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        _set_results([(ticket, Unavailable("the worker stops")) for ticket in abandoned])
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _queue(self, ticket: _Ticket) -> None:
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise Unavailable("the worker does not compute", retry_after_s=RETRY_AFTER_S)
            if len(self._waiting) >= self._max_queued_calls:
                raise Overloaded(
                    f"{self._max_queued_calls} calls are waiting already", retry_after_s=RETRY_AFTER_S
                )
            self._waiting.append(ticket)
            self._changed.notify()

    def _unqueue(self, ticket: _Ticket) -> None:
        """A caller that went away gives its place in the queue free."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _run(self) -> None:
        while (tickets := self._next_pass()) is not None:
            if tickets:
                self._resolve(self._compute_pass(tickets))

    def _next_pass(self) -> list[_Ticket] | None:
        """The oldest call and the waiting ones of its layer; empty now and then while idle, None at the end."""
        with self._changed:
            self._computing = False
            self._heartbeat_s = self._clock()
            if not self._waiting and not self._stopping:
                self._changed.wait(HEARTBEAT_S)
                self._heartbeat_s = self._clock()
            if self._stopping:
                return None
            tickets = _take_pass(self._waiting, self._max_pass_rows)
            self._computing = bool(tickets)
            return tickets

    def _compute_pass(self, tickets: Sequence[_Ticket]) -> _Results:
        start_s = self._clock()
        # Nobody waits for the others any more: `submit` has told their callers, or is about to.
        live = [ticket for ticket in tickets if ticket.call.deadline_s > start_s and not ticket.answer.done()]
        if not live:
            return []
        outputs = self._compute_safely([ticket.call for ticket in live])
        compute_s = self._clock() - start_s
        self._passes += 1
        self._busy_s += compute_s
        return [
            (
                ticket,
                output
                if isinstance(output, MoesaicError)
                else Computed(output, start_s - ticket.queued_s, compute_s),
            )
            for ticket, output in zip(live, outputs, strict=True)
        ]

    def _compute_safely(self, calls: Sequence[Call]) -> Sequence[Tensor | MoesaicError]:
        """The one broad except of this thread: whatever goes wrong in a pass is logged and answered."""
        try:
            return self._compute_calls(calls)
        except Exception:
            log.exception("a pass failed", extra={"fields": {"layer": calls[0].layer, "calls": len(calls)}})
            return [InternalError("internal error") for _ in calls]

    def _resolve(self, results: _Results) -> None:
        """Hands all results of a pass to the event loop with one wake-up."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_set_results, results)


def _take_pass(waiting: deque[_Ticket], max_rows: int) -> list[_Ticket]:
    """Removes the oldest call and, in order, the calls of its layer that fit beside it."""
    if not waiting:
        return []
    first = waiting.popleft()
    taken, left, num_rows = [first], [], first.call.num_rows
    for ticket in waiting:
        if ticket.call.layer == first.call.layer and num_rows + ticket.call.num_rows <= max_rows:
            num_rows += ticket.call.num_rows
            taken.append(ticket)
        else:
            left.append(ticket)
    waiting.clear()
    waiting.extend(left)
    return taken


def _set_results(results: _Results) -> None:
    for ticket, result in results:
        if ticket.answer.done():  # the caller went away
            continue
        if isinstance(result, MoesaicError):
            ticket.answer.set_exception(result)
        else:
            ticket.answer.set_result(result)
