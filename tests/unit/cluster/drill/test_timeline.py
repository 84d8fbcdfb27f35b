"""Pauses and rates around faults, from what clients saw."""

from __future__ import annotations

from cluster.bench.latency import RequestRecord
from cluster.drill.timeline import (
    Span,
    Spread,
    longest_pauses_s,
    pauses_within_s,
    rate_over_time,
    rate_within,
)


def record(*times_s: float, end_s: float = 0.0, error: str = "") -> RequestRecord:
    return RequestRecord(0.0, end_s or times_s[-1], 1, times_s, error=error)


STEADY = record(*(0.5 * step for step in range(21)))
STALLED = record(0.0, 1.0, 4.0, 4.5, 10.0)


def test_the_longest_pause_of_a_window_is_that_of_the_slowest_stream_that_was_live_in_it() -> None:
    windows = [Span(2.0, 3.0), Span(4.1, 4.4), Span(5.0, 6.0), Span(20.0, 21.0)]
    assert longest_pauses_s([STEADY, STALLED], windows) == [3.0, 0.5, 5.5, 0.0]


def test_a_lost_stream_pauses_until_its_error() -> None:
    lost = record(0.0, 1.0, end_s=8.0, error="broke off")
    assert longest_pauses_s([lost], [Span(2.0, 3.0)]) == [7.0]


def test_tokens_that_came_together_have_no_pause_between_them() -> None:
    assert pauses_within_s([record(1.0, 1.0, 2.0)], [Span(0.0, 9.0)]) == [1.0]


def test_pauses_belong_to_the_span_in_which_they_begin() -> None:
    assert pauses_within_s([STALLED], [Span(0.0, 2.0)]) == [1.0, 3.0]


def test_rates_count_tokens_within_spans_alone() -> None:
    assert rate_within([STEADY], [Span(0.0, 2.0), Span(4.0, 6.0)]) == 2.0
    assert rate_within([STEADY], []) == 0.0
    assert rate_over_time([STEADY], Span(0.0, 3.0), 1.0) == (2.0, 2.0, 2.0)


def test_a_spread_of_nothing_has_no_values() -> None:
    assert Spread.of([]) == Spread(None, None, None)
    assert Spread.of([3.0, 1.0, 2.0]).p50_s == 2.0
