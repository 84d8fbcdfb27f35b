"""The calls that wait for the compute thread, and which of them share a pass. Pure: no threads."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from torch import Tensor

from expert_worker.compute.call import ExpertCall
from moesaic.errors import MoesaicError


class Computed(NamedTuple):
    """The output of a call and where its time went."""

    output: Tensor
    queue_s: float
    compute_s: float
    # The time at which the pass ended.
    ended_s: float


class Ticket(Protocol):
    """A queued call and the caller that waits for its answer."""

    @property
    def call(self) -> ExpertCall: ...

    @property
    def queued_s(self) -> float: ...

    @property
    def wanted(self) -> bool:
        """False when the caller does not wait for the answer any more."""
        ...

    def answer(self, result: Computed | MoesaicError) -> None:
        """Called once for every ticket that was taken, mostly on the compute thread. Must not wait."""
        ...


class CallQueue:
    """First come, first served, by layer."""

    def __init__(self) -> None:
        self._waiting: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Frees the place of a ticket that may still be in the queue."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def clear(self) -> list[Ticket]:
        """Empties the queue; returns what was in it."""
        left = list(self._waiting)
        self._waiting.clear()
        return left

    def take_pass(self, max_rows: int) -> list[Ticket]:
        """Removes the oldest call and, in order, those of its layer that fit into a pass beside it."""
        taken: list[Ticket] = []
        left: deque[Ticket] = deque()
        num_rows = 0
        for ticket in self._waiting:
            call = ticket.call
            if not taken or (call.layer == taken[0].call.layer and num_rows + call.num_rows <= max_rows):
                taken.append(ticket)
                num_rows += call.num_rows
            else:
                left.append(ticket)
        self._waiting = left
        return taken
