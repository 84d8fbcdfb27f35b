"""Starts the head of a local Ray again when it has died. Until it is back nothing is started, and serving goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
# A head that has lived so long did not die of its start.
CALM_S = 60.0


class Head(Protocol):
    """What is needed of Ray."""

    def is_alive(self) -> bool: ...

    async def start(self) -> None:
        """Starts another head in the place of the dead one. Raises OSError where it cannot be started."""
        ...


class HeadWatch:
    """Looks after one head for as long as somebody calls `look`; `clock` in seconds."""

    def __init__(self, head: Head, clock: Callable[[], float]) -> None:
        self._head = head
        self._clock = clock
        self._pause_s = 0.0
        self._started_s = clock()
        self._next_start_s: float | None = None

    async def look(self) -> None:
        """Starts the head if it is dead and its pause is over. Returns at once otherwise."""
        if self._head.is_alive():
            return
        if self._next_start_s is None:
            self._plan_start()
        elif self._clock() >= self._next_start_s:
            await self._start()

    def _plan_start(self) -> None:
        now_s = self._clock()
        self._pause_s = next_pause_s(self._pause_s, now_s - self._started_s)
        self._next_start_s = now_s + self._pause_s
        log.warning(
            "Ray's head has died: serving goes on, and the head is started again",
            extra={"fields": {"in_s": self._pause_s}},
        )

    async def _start(self) -> None:
        self._next_start_s = None
        self._started_s = self._clock()
        try:
            await self._head.start()
        except OSError as error:
            log.warning("Ray's head cannot be started: %s", error)


def next_pause_s(last_s: float, lived_s: float) -> float:
    """The pause before the next start: twice the last one, up to a bound, while heads die soon after their start."""
    if lived_s >= CALM_S:
        return FIRST_PAUSE_S
    return min(max(2 * last_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
