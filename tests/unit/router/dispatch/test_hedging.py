"""When late calls are asked of another replica as well, and how often."""

from __future__ import annotations

from router.dispatch.hedging import (
    EXTRA_BURST,
    HEDGE_BURST,
    MIN_DELAY_S,
    OVERDUE,
    UNKNOWN_DELAY_S,
    ExtraCalls,
    hedge_delays_s,
)


def test_a_call_is_late_when_nearly_all_of_its_kind_are_answered_sooner() -> None:
    assert list(hedge_delays_s(0.5)) == [(0.5, False), (OVERDUE * 0.5, True)]


def test_no_call_is_late_within_a_hiccup() -> None:
    assert next(hedge_delays_s(0.0004)) == (MIN_DELAY_S, False)


def test_before_anything_is_known_the_delay_is_a_fixed_one() -> None:
    assert next(hedge_delays_s(None)) == (UNKNOWN_DELAY_S, False)


def test_hedges_are_one_in_twenty_calls_whatever_happens() -> None:
    extra, hedges = ExtraCalls(), 0
    for _ in range(10_000):
        extra.note_call()
        hedges += extra.may_hedge(1, is_overdue=False)
    assert 499 <= hedges <= 500 + HEDGE_BURST


def test_retries_and_hedges_together_are_one_in_ten() -> None:
    extra, more = ExtraCalls(), 0
    for _ in range(10_000):
        extra.note_call()
        more += extra.may_hedge(1, is_overdue=False)
        more += extra.may_retry()
        more += extra.may_hedge(1, is_overdue=True)
    assert 990 <= more <= 1000 + EXTRA_BURST


def test_a_hedge_that_takes_several_calls_costs_as_many() -> None:
    extra = ExtraCalls()
    assert not extra.may_hedge(int(HEDGE_BURST) + 1, is_overdue=False)
    assert extra.may_hedge(int(HEDGE_BURST), is_overdue=False)
    assert not extra.may_hedge(1, is_overdue=False) and extra.may_retry()
