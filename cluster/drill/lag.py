"""How late this program itself is: it shares the cores with what it measures, and its delays look like pauses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

PERIOD_S = 0.02


@contextlib.asynccontextmanager
async def watched_lag(clock: Callable[[], float]) -> AsyncIterator[list[tuple[float, float]]]:
    """When each short sleep ended, and by how many seconds it was too long, until the context ends."""
    late_s: list[tuple[float, float]] = []

    async def sleep() -> None:
        while True:
            due_s = clock() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            late_s.append((clock(), clock() - due_s))

    sleeping = asyncio.create_task(sleep())
    try:
        yield late_s
    finally:
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)
