"""The contract has a bound for every fault, and says what of it figures break."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.drill.contract import CONTRACT, Bound, Figures, broken
from cluster.drill.faults import Fault

GOOD = Figures(
    pause_p99_s=0.3,
    control_pause_p99_s=0.2,
    token_p99_ratio=1.5,
    calls_ratio=1.0,
    recovery_s=3.0,
    quarantine_s=0.5,
    stop_s=0.05,
    leaked_blocks=0,
    refusal_s=0.02,
    goodput_ratio=0.95,
    growth_ratio=1.0,
)


def test_every_fault_has_a_bound_that_good_figures_keep() -> None:
    assert set(CONTRACT) == set(Fault)
    for bound in CONTRACT.values():
        assert broken(bound, GOOD) == ()
        assert (bound.lost, bound.wrong_tokens, bound.mixed) == (0, 0, 0)


@pytest.mark.parametrize(
    ("fault", "worse", "said"),
    [
        (Fault.KILL, {"lost": 1}, "1 requests lost"),
        (Fault.KILL, {"wrong_tokens": 2}, "2 wrong tokens"),
        (Fault.KILL, {"mixed": 1}, "1 answers of mixed versions"),
        (Fault.KILL, {"pause_p99_s": 0.5}, "0.30 s above the control's"),
        (Fault.KILL, {"not_recovered": 1}, "not whole again after 1 faults"),
        (Fault.KILL, {"left_behind": 3}, "3 processes left behind"),
        (Fault.SLOW, {"token_p99_ratio": 2.5}, "2.5 x the control's"),
        (Fault.SLOW, {"calls_ratio": 1.06}, "1.06 x the control's"),
        (Fault.PAIR, {"recovery_s": 5.5}, "whole again after 5.5 s"),
        (Fault.NAN, {"quarantine_s": 1.5}, "asked for 1.5 s"),
        (Fault.CANCEL, {"leaked_blocks": 1}, "1 KV blocks leaked"),
        (Fault.CANCEL, {"stop_s": 0.2}, "0.2 s after the client had left"),
        (Fault.OVERLOAD, {"goodput_ratio": 0.5}, "goodput 0.50"),
        (Fault.OVERLOAD, {"refusal_s": 0.2}, "refusal p99 0.2 s"),
        (Fault.OVERLOAD, {"refusals_without_retry_after": 1}, "without Retry-After"),
        (Fault.SWAP, {"torn": 1}, "1 changes left neither the old epoch nor the new one"),
        (Fault.ALL, {"growth_ratio": 1.3}, "grew to 1.3 x"),
    ],
)
def test_what_is_broken_is_said_with_its_figure(fault: Fault, worse: dict[str, float], said: str) -> None:
    (sentence,) = broken(CONTRACT[fault], replace(GOOD, **worse))
    assert said in sentence


def test_what_was_not_measured_breaks_nothing() -> None:
    assert broken(Bound(pause_above_s=0.1, recovery_s=1.0), Figures()) == ()
