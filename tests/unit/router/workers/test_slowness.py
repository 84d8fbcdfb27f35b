"""How slow a replica is beside the usual."""

from __future__ import annotations

import pytest

from router.workers.call_times import REFRESH, CallTimes
from router.workers.slowness import HALF_LIFE_S, Slowness


def test_one_slow_call_is_a_hiccup_and_several_are_a_slow_replica() -> None:
    slowness = Slowness()
    slowness.note(10.0, 0.0)
    assert slowness.factor(0.0) == 1.0
    for _ in range(30):
        slowness.note(10.0, 0.0)
    assert slowness.factor(0.0) == pytest.approx(10.0, rel=0.1)


def test_what_was_measured_long_ago_counts_less() -> None:
    slowness = Slowness()
    for _ in range(50):
        slowness.note(10.0, 0.0)
    assert slowness.factor(HALF_LIFE_S) == pytest.approx(5.5, rel=0.1)
    assert slowness.factor(10 * HALF_LIFE_S) == 1.0


def test_calls_are_compared_with_the_faster_ones_of_their_size() -> None:
    times = CallTimes()
    for _ in range(2 * REFRESH):
        times.add(5, 0.001)
        times.add(5, 0.010)
        times.add(500, 0.1)
    assert times.add(6, 0.01) == pytest.approx(10.0)
    assert times.add(400, 0.1) == pytest.approx(1.0)
    assert times.late_s(7) == pytest.approx(0.01) and times.late_s(300) == pytest.approx(0.1)


def test_of_sizes_that_were_seldom_seen_nothing_is_known() -> None:
    times = CallTimes()
    assert times.late_s(1) is None and times.add(1, 1.0) is None and times.late_s(1) is None
