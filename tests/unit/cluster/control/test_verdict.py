"""Which figures end a canary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.control.verdict import EpochFigures, judge
from moesaic.settings import RolloutSettings
from moesaic.v1 import control_pb2

LIMITS = RolloutSettings(
    min_canary_requests=10,
    max_more_errors=0.1,
    max_latency_ratio=2,
    min_shadow_cosine=0.9,
    max_golden_drift=0.5,
)
GOOD = EpochFigures(finished=100, token_p99_s=0.1, first_token_p50_s=0.2)


@pytest.mark.parametrize(
    ("canary", "drift", "detail"),
    [
        (replace(GOOD, not_finite=2), None, "2 sequences had values that are not finite"),
        (EpochFigures(not_finite=1), None, "1 sequences had values that are not finite"),
        (
            EpochFigures(shadow_rows=8, shadow_max_difference=math.inf),
            None,
            "of 8 shadow answers, some are not finite",
        ),
        (GOOD, 0.6, "golden prompts drift by 0.6 nats a token, the limit is 0.5"),
        (
            replace(GOOD, shadow_rows=5, shadow_mean_cosine=0.8),
            None,
            "shadow answers have a mean cosine of 0.8, the limit is 0.9",
        ),
        (replace(GOOD, finished=80, failed=20), None, "the error rate is higher by 0.2, the limit is 0.1"),
        (
            replace(GOOD, token_p99_s=0.3),
            None,
            "p99 between tokens is 3 times the current epoch's, the limit is 2",
        ),
        (
            replace(GOOD, first_token_p50_s=0.5),
            None,
            "p50 to the first token is 2.5 times the current epoch's, the limit is 2",
        ),
    ],
)
def test_what_is_beyond_a_limit_rolls_back_with_its_figure(
    canary: EpochFigures, drift: float | None, detail: str
) -> None:
    verdict = judge(canary, GOOD, drift, LIMITS)
    assert (verdict.roll_back, verdict.detail) == (True, detail)


@pytest.mark.parametrize(
    "canary", [GOOD, EpochFigures(), EpochFigures(finished=5, failed=4), replace(GOOD, token_p99_s=0.19)]
)
def test_what_is_good_or_not_known_yet_stays(canary: EpochFigures) -> None:
    assert not judge(canary, GOOD, 0.1, LIMITS).roll_back


def test_answers_that_point_anywhere_are_no_fault_without_a_limit() -> None:
    new = EpochFigures(shadow_rows=8, shadow_mean_cosine=-0.02, shadow_max_difference=3.0)
    assert not judge(new, GOOD, None, RolloutSettings()).roll_back


def test_latency_is_not_compared_with_too_few_requests_of_the_current_epoch() -> None:
    assert not judge(
        replace(GOOD, token_p99_s=9.0), EpochFigures(finished=3, token_p99_s=0.1), None, LIMITS
    ).roll_back


def test_the_figures_of_several_routers_are_added_and_the_worst_time_counts() -> None:
    reports = [
        control_pb2.EpochStats(finished=3, token_p99_s=0.1, shadow_rows=1, shadow_mean_cosine=1.0),
        control_pb2.EpochStats(
            finished=4,
            failed=1,
            token_p99_s=0.3,
            shadow_rows=3,
            shadow_mean_cosine=0.6,
            shadow_max_difference=2.0,
        ),
    ]
    figures = EpochFigures.of(reports)
    assert (figures.finished, figures.failed, figures.token_p99_s, figures.shadow_rows) == (7, 1, 0.3, 4)
    assert figures.shadow_mean_cosine == pytest.approx(0.7)
    assert figures.shadow_max_difference == 2.0
    assert figures.error_rate == pytest.approx(0.125)
