"""Two or more sides measured in turn in one run: medians, and ratios pair by pair.

A machine drifts by more than most differences that matter. Therefore the sides take turns, each round in the
opposite order, and what is stated is a ratio. A round in which the machine was not quiet is taken again, a
bounded number of times; after that it is kept and marked.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.bench.other_load import wait_until_quiet, watch

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Side(Generic[_T]):
    """One way to do the work; the processes `pids` must be idle while another side has its turn."""

    name: str
    measure: Callable[[], _T]
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """How often to measure; `settle_s` bounds the wait for a quiet machine before each measurement."""

    rounds: int = 5
    retries: int = 3
    settle_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of medians, with the range of the ratios of single rounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Turns(Generic[_T]):
    """What the sides did, round by round."""

    rounds: tuple[Mapping[str, _T], ...]
    # The most cores that were used by others, or by a side out of its turn, in any measurement of the round.
    others_cores: tuple[float, ...]
    # Whether a round was kept although the machine was not quiet.
    disturbed: tuple[bool, ...]

    def values(self, side: str, of: Callable[[_T], float]) -> list[float]:
        return [of(round_[side]) for round_ in self.rounds]

    def median(self, side: str, of: Callable[[_T], float]) -> float:
        return statistics.median(self.values(side, of))

    def ratio(self, side: str, other: str, of: Callable[[_T], float]) -> Ratio:
        """`side` over `other`."""
        return ratio(self.values(side, of), self.values(other, of))


def ratio(values: Sequence[float], others: Sequence[float]) -> Ratio:
    """The ratio of medians, and the lowest and highest of the pairs."""
    pairs = [value / other for value, other in zip(values, others, strict=True)]
    return Ratio(statistics.median(values) / statistics.median(others), min(pairs), max(pairs))


def take_turns(sides: Iterable[Side[_T]], rules: Rules, label: str = "") -> Turns[_T]:
    """Runs `rules.rounds` rounds, in each of which every side has one turn."""
    sides = tuple(sides)
    kept: list[tuple[Mapping[str, _T], float, bool]] = []
    retries_left = rules.retries
    while len(kept) < rules.rounds:
        order = sides if len(kept) % 2 == 0 else sides[::-1]
        results: dict[str, _T] = {}
        others, quiet = 0.0, True
        for side in order:
            wait_until_quiet(rules.settle_s)
            idle = [pid for other in sides if other is not side for pid in other.pids]
            results[side.name], watched = watch(side.measure, idle)
            others = max(others, watched.others_cores, watched.idle_cores)
            quiet &= watched.quiet
        if not quiet and retries_left > 0:
            retries_left -= 1
            progress(f"{label}: not quiet ({others:.2f} cores went elsewhere), this round is taken again")
            continue
        kept.append((results, others, not quiet))
        progress(f"{label}: round {len(kept)} of {rules.rounds}{'' if quiet else ' (disturbed)'}")
    return Turns(*zip(*kept, strict=True))


def progress(line: str) -> None:
    """Prints to standard error; standard output is for tables."""
    print(line, file=sys.stderr, flush=True)
