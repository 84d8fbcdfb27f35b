"""A signal that wakes whoever waits for it at that moment."""

from __future__ import annotations

import asyncio
import contextlib


class Pulse:
    """Nothing is counted or kept: a waiter looks at the state first, and waits before anything else can run."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def beat(self) -> None:
        now, self._next = self._next, asyncio.Event()
        now.set()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until the next beat, at most so long."""
        waiting = self._next
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await waiting.wait()
