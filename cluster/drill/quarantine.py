"""For how long a worker is asked although its answers are wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from cluster.observation.observer import Observer
from moesaic.errors import MoesaicError

PERIOD_S = 0.1
# A router may try whether a worker is well again: so few calls within WINDOW_S are probes.
PROBES = 2
WINDOW_S = 0.5


@dataclass(slots=True)
class CallWatch:
    """The calls of all routers to one worker over time, from `start_s`."""

    start_s: float
    samples: list[tuple[float, int]] = field(default_factory=list)

    def asked_s(self, until_s: float) -> float:
        """For how long it was asked before `until_s`, when its answers were right again."""
        samples = self._before(until_s)
        return asked_until_s(samples) - self.start_s if samples else 0.0

    def calls(self, until_s: float) -> int:
        """The calls until then, probes included."""
        samples = self._before(until_s)
        return samples[-1][1] - samples[0][1] if samples else 0

    def _before(self, until_s: float) -> list[tuple[float, int]]:
        return [sample for sample in self.samples if sample[0] <= until_s]


def asked_until_s(samples: Sequence[tuple[float, int]]) -> float:
    """The end of the last WINDOW_S in which the worker got more than PROBES calls; the first moment without one.

    `samples`: moments, each with the calls until then.
    """
    until_s, first = samples[0][0], 0
    for now_s, calls in samples:
        while samples[first][0] < now_s - WINDOW_S:
            first += 1
        if calls - samples[first][1] > PROBES:
            until_s = now_s
    return until_s


@contextlib.asynccontextmanager
async def watched_calls(
    observer: Observer, worker: str, clock: Callable[[], float]
) -> AsyncIterator[CallWatch]:
    """Counts until the context ends. A moment at which no router answers is left out."""
    watch = CallWatch(clock())

    async def count() -> None:
        while True:
            with contextlib.suppress(MoesaicError):
                seen = await observer.observe_routers()
                calls = sum(
                    traffic.calls
                    for stats in seen.routers.values()
                    for traffic in stats.workers
                    if traffic.worker == worker
                )
                watch.samples.append((clock(), calls))
            await asyncio.sleep(PERIOD_S)

    counting = asyncio.create_task(count())
    try:
        yield watch
    finally:
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
