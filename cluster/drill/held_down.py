"""Keeps processes dead for a while: whatever comes back in the place of one is killed, too."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterable

from cluster.drill.signals import send

# Rarely enough that looking for them does not slow down what is measured.
PERIOD_S = 1.0


@contextlib.asynccontextmanager
async def held_down(find: Callable[[], Iterable[int]]) -> AsyncIterator[None]:
    """Kills the processes that `find` finds, now and again until the context ends."""

    async def hold() -> None:
        while True:
            send(signal.SIGKILL, await asyncio.to_thread(find))
            await asyncio.sleep(PERIOD_S)

    send(signal.SIGKILL, find())
    holding = asyncio.create_task(hold())
    try:
        yield
    finally:
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
