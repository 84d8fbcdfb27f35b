"""Whether an epoch on trial is rolled back: the decision, with the figure that decides. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moesaic.settings import RolloutSettings
from moesaic.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class EpochFigures:
    """How the sequences of one epoch do, over all routers. Times are in seconds; the worst router counts."""

    finished: int = 0
    failed: int = 0
    not_finite: int = 0
    token_p99_s: float = 0.0
    first_token_p50_s: float = 0.0
    shadow_rows: int = 0
    shadow_mean_cosine: float = 1.0
    # Infinite where some answer was not finite.
    shadow_max_difference: float = 0.0

    @classmethod
    def of(cls, reports: Iterable[control_pb2.EpochStats]) -> EpochFigures:
        """One report of each router."""
        reports = list(reports)
        rows = sum(report.shadow_rows for report in reports)
        cosine = sum(report.shadow_rows * report.shadow_mean_cosine for report in reports)
        return cls(
            finished=sum(report.finished for report in reports),
            failed=sum(report.failed for report in reports),
            not_finite=sum(report.not_finite for report in reports),
            token_p99_s=max((report.token_p99_s for report in reports), default=0.0),
            first_token_p50_s=max((report.first_token_p50_s for report in reports), default=0.0),
            shadow_rows=rows,
            shadow_mean_cosine=cosine / rows if rows else 1.0,
            shadow_max_difference=max((report.shadow_max_difference for report in reports), default=0.0),
        )

    @property
    def ended(self) -> int:
        return self.finished + self.failed

    @property
    def error_rate(self) -> float:
        return self.failed / self.ended if self.ended else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided, and why, in one sentence with its figure."""

    roll_back: bool
    detail: str


def judge(
    canary: EpochFigures, baseline: EpochFigures, golden_drift: float | None, limits: RolloutSettings
) -> Verdict:
    """Compares an epoch on trial with the current one.

    `golden_drift`: the mean absolute difference of the golden prompts' log probabilities, in nats a token; None while
    it is not measured. Error rate and latency count from `min_canary_requests` on, on both sides; what is not finite,
    and drift, at once.
    """
    if canary.not_finite:
        return Verdict(True, f"{canary.not_finite} sequences had values that are not finite")
    if math.isinf(canary.shadow_max_difference):
        return Verdict(True, f"of {canary.shadow_rows} shadow answers, some are not finite")
    if golden_drift is not None and golden_drift > limits.max_golden_drift:
        return _beyond("golden prompts drift by", golden_drift, limits.max_golden_drift, "nats a token")
    if canary.shadow_rows and canary.shadow_mean_cosine < limits.min_shadow_cosine:
        return _beyond(
            "shadow answers have a mean cosine of", canary.shadow_mean_cosine, limits.min_shadow_cosine
        )
    if canary.ended >= limits.min_canary_requests:
        return _judge_requests(canary, baseline, limits) or _pass(canary, golden_drift)
    return _pass(canary, golden_drift)


def _judge_requests(canary: EpochFigures, baseline: EpochFigures, limits: RolloutSettings) -> Verdict | None:
    more_errors = canary.error_rate - baseline.error_rate
    if more_errors > limits.max_more_errors:
        return _beyond("the error rate is higher by", more_errors, limits.max_more_errors)
    if baseline.ended < limits.min_canary_requests:
        return None
    for what, new, old in (
        ("p99 between tokens", canary.token_p99_s, baseline.token_p99_s),
        ("p50 to the first token", canary.first_token_p50_s, baseline.first_token_p50_s),
    ):
        if old and new / old > limits.max_latency_ratio:
            return _beyond(f"{what} is", new / old, limits.max_latency_ratio, "times the current epoch's")
    return None


def _beyond(what: str, figure: float, limit: float, unit: str = "") -> Verdict:
    return Verdict(True, f"{what} {figure:.4g}{f' {unit}' if unit else ''}, the limit is {limit:.4g}")


def _pass(canary: EpochFigures, golden_drift: float | None) -> Verdict:
    figures = [f"{canary.finished} requests finished, {canary.failed} failed"]
    if canary.shadow_rows:
        figures.append(f"mean cosine of {canary.shadow_rows} shadowed rows {canary.shadow_mean_cosine:.6f}")
    if golden_drift is not None:
        figures.append(f"golden prompts drift by {golden_drift:.4g} nats a token")
    return Verdict(False, "; ".join(figures))
