"""Tokens over time: rates within turns, and the longest pause of any stream around a fault. Pure.

All times are seconds on the clock of the drill.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.bench.latency import RequestRecord, percentile


@dataclass(frozen=True, slots=True)
class Span:
    """Some time of a drill."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def meets(self, start_s: float, end_s: float) -> bool:
        return start_s < self.end_s and end_s > self.start_s

    def shifted(self, by_s: float) -> Span:
        return Span(self.start_s + by_s, self.end_s + by_s)


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle, the 99th percentile and the largest of some durations; None where there are none."""

    p50_s: float | None
    p99_s: float | None
    max_s: float | None

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        ordered = sorted(seconds)
        if not ordered:
            return cls(None, None, None)
        return cls(percentile(ordered, 0.5), percentile(ordered, 0.99), ordered[-1])


def longest_pauses_s(records: Iterable[RequestRecord], windows: Sequence[Span]) -> list[float]:
    """For every window the longest pause between two tokens of a stream that was live in it; 0 without one.

    A request that failed has a last pause: from its last token to the error.
    """
    pauses = sorted(pause for record in records for pause in _pauses(record))
    return [
        max((end_s - start_s for start_s, end_s in pauses if window.meets(start_s, end_s)), default=0.0)
        for window in windows
    ]


def pauses_within_s(records: Iterable[RequestRecord], spans: Sequence[Span]) -> list[float]:
    """Every pause between two tokens of a stream that began in one of the spans."""
    return [
        end_s - start_s
        for record in records
        for start_s, end_s in _pauses(record)
        if any(span.start_s <= start_s < span.end_s for span in spans)
    ]


def values_within(samples: Iterable[tuple[float, float]], spans: Sequence[Span]) -> list[float]:
    """The values of those samples, each a moment and a value, that lie in one of the spans."""
    return [value for at_s, value in samples if any(span.start_s <= at_s < span.end_s for span in spans)]


def tokens_within(records: Iterable[RequestRecord], spans: Sequence[Span]) -> int:
    times_s = sorted(time_s for record in records for time_s in record.token_times_s)
    return sum(
        bisect.bisect_left(times_s, span.end_s) - bisect.bisect_left(times_s, span.start_s) for span in spans
    )


def rate_within(records: Iterable[RequestRecord], spans: Sequence[Span]) -> float:
    """Tokens a second; 0 for no time."""
    seconds = sum(span.seconds for span in spans)
    return tokens_within(records, spans) / seconds if seconds > 0 else 0.0


def rate_over_time(records: Iterable[RequestRecord], span: Span, step_s: float) -> tuple[float, ...]:
    """Tokens a second in each step of a span."""
    counts = [0] * max(1, int(span.seconds / step_s))
    for record in records:
        for time_s in record.token_times_s:
            step = int((time_s - span.start_s) / step_s)
            if 0 <= step < len(counts):
                counts[step] += 1
    return tuple(count / step_s for count in counts)


def _pauses(record: RequestRecord) -> Iterator[tuple[float, float]]:
    """Two tokens that came in one piece have no pause between them."""
    times_s = record.token_times_s
    yield from (pair for pair in pairwise(times_s) if pair[1] > pair[0])
    if record.error and times_s:
        yield times_s[-1], record.end_s
