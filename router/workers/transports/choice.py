"""Which of several ways calls take: real calls try all of them in turn, the fastest stays for a while, and they are tried
again. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from router.workers.transports.base import GRPC, Way

# Calls that each way gets: the first few open buffers and fill caches, the rest are compared. Enough for a disturbance of
# some of them not to decide.
WARM_UP_CALLS = 4
COMPARED_CALLS = 48
# For so many calls the choice holds. Links live for days, and what was measured while a host was busy need not stay true.
HELD_CALLS = 10_000
# Another way must be so much better than gRPC's own that the difference is none of the noise.
MUST_SAVE = 0.1

_CALLS = WARM_UP_CALLS + COMPARED_CALLS


class WayTrial:
    """Belongs to the thread that sends and receives. gRPC's own way is always there; `others` may be given up."""

    def __init__(self, others: Iterable[Way] = ()) -> None:
        self._begin((GRPC, *others))

    def next_way(self) -> Way:
        """The way of the next call. During a trial it changes after two calls, so that each of two micro-batches goes
        them all."""
        self._num_calls += 1
        if self._ranking and self._num_calls > HELD_CALLS:
            self._begin(self._overheads_s)
        if self._ranking:
            return self._ranking[0]
        ways = list(self._overheads_s)
        return ways[self._num_calls // 2 % len(ways)]

    def observe(self, way: Way, overhead_s: float) -> None:
        """Takes what a call waited beyond the worker's own work."""
        if self._ranking or way not in self._overheads_s:
            return
        seen_s = self._overheads_s[way]
        if len(seen_s) < _CALLS:
            seen_s.append(overhead_s)
            self._conclude()

    def give_up(self, way: Way) -> None:
        """From now on without a way that broke, which is never gRPC's own: the best of the rest is next."""
        self._overheads_s.pop(way, None)
        if way in self._ranking:
            self._ranking.remove(way)
        else:
            self._conclude()

    def _begin(self, ways: Iterable[Way]) -> None:
        """Tries these ways, also those that were not worth taking before."""
        self._overheads_s: dict[Way, list[float]] = {way: [] for way in ways}
        # Since the trial began, or since it ended.
        self._num_calls = 0
        # The ways worth taking, the best first; empty during a trial.
        self._ranking: list[Way] = []
        self._conclude()

    def _conclude(self) -> None:
        """Ends a trial where there is nothing left to try."""
        seen_s = self._overheads_s
        if len(seen_s) == 1:
            self._ranking = [GRPC]
        elif min(map(len, seen_s.values())) == _CALLS:
            self._ranking = rank({way: those[WARM_UP_CALLS:] for way, those in seen_s.items()})
        if self._ranking:
            self._num_calls = 0


def rank(overheads_s: Mapping[Way, Sequence[float]]) -> list[Way]:
    """The ways that are clearly faster than gRPC's own, the fastest first, then that one."""
    medians_s = {way: median(those) for way, those in overheads_s.items()}
    worth_s = (1 - MUST_SAVE) * medians_s.pop(GRPC)
    return [*sorted((way for way in medians_s if medians_s[way] < worth_s), key=medians_s.__getitem__), GRPC]
