"""The events of a call that its client has not read yet, and what their number means.

From `capacity` on the buffer is full: the call's sequences are paused until the client has read most of it. A
client that reads nothing from a full buffer for `UNREAD_TIMEOUT_S` is cut off.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

# Unread events of one sequence at which it is paused, and at which it is resumed. Between the two lies enough that a
# reader of the usual speed never meets either.
PAUSE_AT = 128
RESUME_AT = 32
# How long a call whose buffer is full waits for its client to read.
UNREAD_TIMEOUT_S = 60.0

_Event = TypeVar("_Event")


class EventBuffer(Generic[_Event]):
    """A queue of events. `on_full` and `on_drained` are called in turn, `on_full` first."""

    def __init__(
        self,
        num_sequences: int,
        *,
        on_full: Callable[[], None],
        on_drained: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_sequences = num_sequences
        self._on_full = on_full
        self._on_drained = on_drained
        self._clock = clock
        self._events: deque[_Event] = deque()
        self._last_read_s = 0.0
        self._is_full = False

    def __len__(self) -> int:
        return len(self._events)

    @property
    def unread_until_s(self) -> float | None:
        """The time at which the client counts as gone unless it reads; None while the buffer is not full."""
        return self._last_read_s + UNREAD_TIMEOUT_S if self._is_full else None

    def extend(self, events: Iterable[_Event]) -> None:
        self._events.extend(events)
        if not self._is_full and len(self._events) >= PAUSE_AT * self._num_sequences:
            self._is_full, self._last_read_s = True, self._clock()
            self._on_full()

    def take(self) -> _Event:
        """The next event; there is one."""
        self._last_read_s = self._clock()
        event = self._events.popleft()
        if self._is_full and len(self._events) <= RESUME_AT * self._num_sequences:
            self._is_full = False
            self._on_drained()
        return event
