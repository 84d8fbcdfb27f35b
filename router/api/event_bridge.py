"""Carries events from the engine's thread onto an event loop: many at once, for one wake-up.

To wake a loop costs a system call, and the engine's thread should be in its next step by the time the loop runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class EventBridge:
    """Calls what was put into it on the loop that it was made on, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # As bounded as what its senders have open: max_tokens and a few more of every sequence.
        self._events: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_woken = False

    def put(self, take: Callable[..., None], *args: Any) -> None:
        """Has `take(*args)` called on the loop. Thread-safe; neither waits nor raises."""
        self._events.append((take, args))
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._empty)
            except RuntimeError:  # the loop is closed: the process ends, and nobody is left to tell
                log.debug("an event came after the end of the event loop")

    def _empty(self) -> None:
        # Before the letters are read: whatever is put in from here on wakes the loop again.
        self._is_woken = False
        while self._events:
            take, args = self._events.popleft()
            take(*args)
