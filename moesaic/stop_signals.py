"""SIGINT, SIGTERM, SIGHUP: the first requests a stop, the second an immediate one, the third ends all.

The handlers are plain ones rather than the event loop's, because the loop stands still while Ray starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from moesaic.garbage import freeze_lasting_objects

_R = TypeVar("_R")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(Exception):
    """A stop was requested during work that had not ended."""


class StopSignals:
    """A context for the main thread, inside a running event loop."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.force = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._receive) for number in _SIGNALS if not _is_nohup(number)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def unless_stopped(self, work: Coroutine[Any, Any, _R]) -> _R:
        """The result of `work`; cancels it and raises StopRequested when a signal comes first."""
        task, stopped = asyncio.create_task(work), asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise StopRequested
            return await task
        finally:
            task.cancel()
            stopped.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        signal.alarm(0)  # see `take_signals_back`
        self._count += 1
        if self._count == 1:
            self._loop.call_soon_threadsafe(self.stop.set)
        elif self._count == 2:
            self._loop.call_soon_threadsafe(self.force.set)
        else:
            raise KeyboardInterrupt


def take_signals_back() -> None:
    """Puts Python's handler of SIGTERM back in the place of one that a library has installed in C.

    Ray's handler calls the former one, but first sets an alarm that aborts the process three seconds later.
    """
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.alarm(0)


async def serve_until_signal(start: Coroutine[Any, Any, None], stop: Callable[[], Awaitable[None]]) -> None:
    """Runs `start` and, after a signal, `stop`.

    A signal cancels a `start` that has not ended. A second one ends the process at once.
    """
    try:
        with StopSignals() as signals, contextlib.suppress(StopRequested):
            await signals.unless_stopped(start)
            freeze_lasting_objects()
            await signals.stop.wait()
    finally:
        await stop()


def _is_nohup(number: signal.Signals) -> bool:
    """A process that was started to survive its terminal, by nohup, ignores SIGHUP."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
