"""Real calls try stream and lane in turn; the faster one stays."""

from __future__ import annotations

import pytest

from router.lane_trial import COMPARED_CALLS, WARM_UP_CALLS, LaneTrial

NUM_CALLS = 2 * (WARM_UP_CALLS + COMPARED_CALLS)


def run(trial: LaneTrial, grpc_s: float, lane_s: float, num_calls: int = NUM_CALLS) -> None:
    for call_id in range(num_calls):
        over_lane = trial.takes_lane(call_id)
        trial.observe(over_lane, lane_s if over_lane else grpc_s)


@pytest.mark.parametrize(("lane_s", "wins"), [(1e-4, True), (9e-4, False)])
def test_the_lane_stays_where_it_was_measured_faster(lane_s: float, wins: bool) -> None:
    trial = LaneTrial()
    run(trial, grpc_s=5e-4, lane_s=lane_s)
    assert {trial.takes_lane(call_id) for call_id in range(8)} == {wins}


def test_each_of_two_micro_batches_goes_both_ways_during_the_trial() -> None:
    trial = LaneTrial()
    for batch in (0, 1):
        assert {trial.takes_lane(call_id) for call_id in range(batch, 16, 2)} == {False, True}


def test_the_first_calls_of_a_way_do_not_count() -> None:
    trial = LaneTrial()
    run(trial, grpc_s=5e-4, lane_s=1.0, num_calls=2 * WARM_UP_CALLS)
    run(trial, grpc_s=5e-4, lane_s=1e-4)
    assert trial.takes_lane(0)


def test_what_comes_after_the_choice_changes_nothing() -> None:
    trial = LaneTrial()
    run(trial, grpc_s=5e-4, lane_s=1e-4)
    run(trial, grpc_s=1e-6, lane_s=1.0)
    assert trial.takes_lane(0)
