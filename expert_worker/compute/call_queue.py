"""The calls that wait for the compute thread, and which of them share a pass: pure, no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from expert_worker.compute.call import Call
from moesaic.errors import MoesaicError


class Computed(NamedTuple):
    """A call's output and where its time went."""

    output: Tensor
    queue_s: float
    compute_s: float
    # When its pass was over.
    ended_s: float


class Ticket(Protocol):
    """A call and who waits for it."""

    @property
    def call(self) -> Call: ...

    @property
    def caller(self) -> Hashable:
        """The router's stream or lane: what tells callers apart."""
        ...

    @property
    def queued_s(self) -> float: ...

    @property
    def wanted(self) -> bool:
        """False when nobody waits for the answer any more."""
        ...

    def answer(self, result: Computed | MoesaicError) -> None:
        """Comes once for every ticket that was taken, mostly on the compute thread. Must not wait."""
        ...


class CallQueue:
    """First come, first served, by layer."""

    def __init__(self) -> None:
        self._waiting: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._waiting)

    def add(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)

    def remove(self, ticket: Ticket) -> bool:
        """Gives its place free; False when it has none any more."""
        if ticket not in self._waiting:
            return False
        self._waiting.remove(ticket)
        return True

    def clear(self) -> list[Ticket]:
        """Empties the queue; returns what was in it."""
        left = list(self._waiting)
        self._waiting.clear()
        return left

    def next_pass(self, max_rows: int) -> list[Ticket]:
        """What the next pass would be: the oldest call and, in order, the calls of its layer that fit beside it."""
        taken: list[Ticket] = []
        num_rows = 0
        for ticket in self._waiting:
            call = ticket.call
            if not taken or (call.layer == taken[0].call.layer and num_rows + call.num_rows <= max_rows):
                taken.append(ticket)
                num_rows += call.num_rows
        return taken

    def take(self, tickets: list[Ticket]) -> None:
        """Removes the tickets of a pass."""
        if len(tickets) == len(self._waiting):
            self._waiting.clear()
            return
        gone = set(map(id, tickets))
        self._waiting = deque(ticket for ticket in self._waiting if id(ticket) not in gone)
