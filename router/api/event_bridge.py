"""Carries events from the engine's thread to an event loop, many of them for one wake-up.

Waking a loop costs a system call, and the engine's thread should begin its next step meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class EventBridge:
    """Runs callbacks on the loop on which it was created, in the order in which they were put."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Bounded by what the engine reports while the loop does something else.
        self._callbacks: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_woken = False

    def put(self, callback: Callable[..., None], *args: Any) -> None:
        """Schedules `callback(*args)` on the loop. Thread-safe; neither waits nor raises."""
        self._callbacks.append((callback, args))
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: the process is ending, and no call is open any more
                log.debug("an event came after the end of the event loop")

    def _drain(self) -> None:
        # Set before the callbacks are taken, so that one that is put from here on wakes the loop again.
        self._is_woken = False
        while self._callbacks:
            callback, args = self._callbacks.popleft()
            callback(*args)
