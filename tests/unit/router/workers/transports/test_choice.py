"""Real calls try all ways in turn; the fastest stays for a while, and the next best follows where it breaks."""

from __future__ import annotations

import pytest

from router.workers.transports.base import DIRECT, GRPC, LANE, Way
from router.workers.transports.choice import COMPARED_CALLS, HELD_CALLS, WARM_UP_CALLS, WayTrial, rank

Overheads = dict[Way, float]


def run(trial: WayTrial, overheads_s: Overheads, calls_each: int = WARM_UP_CALLS + COMPARED_CALLS) -> None:
    for _ in range(calls_each * len(overheads_s)):
        way = trial.next_way()
        trial.observe(way, overheads_s[way])


def ways_of(trial: WayTrial, num_calls: int = 12) -> list[Way]:
    return [trial.next_way() for _ in range(num_calls)]


def tried(overheads_s: Overheads) -> WayTrial:
    trial = WayTrial(way for way in overheads_s if way != GRPC)
    run(trial, overheads_s)
    return trial


@pytest.mark.parametrize(
    ("overheads_s", "stays"),
    [
        ({GRPC: 5e-4, LANE: 1e-4}, LANE),
        ({GRPC: 5e-4, LANE: 9e-4}, GRPC),
        ({GRPC: 5e-4, DIRECT: 2e-4, LANE: 1e-4}, LANE),
        ({GRPC: 5e-4, DIRECT: 1e-4, LANE: 2e-4}, DIRECT),
        ({GRPC: 5e-4, DIRECT: 6e-4, LANE: 7e-4}, GRPC),
    ],
)
def test_the_fastest_way_stays(overheads_s: Overheads, stays: Way) -> None:
    assert set(ways_of(tried(overheads_s))) == {stays}


def test_another_way_than_grpcs_own_must_be_clearly_faster() -> None:
    grpc_s = [50e-6, 52e-6, 48e-6]
    assert rank({GRPC: grpc_s, DIRECT: [49e-6, 46e-6, 47e-6]}) == [GRPC]
    assert rank({GRPC: grpc_s, DIRECT: [40e-6], LANE: [39e-6]}) == [LANE, DIRECT, GRPC]


def test_single_slow_calls_decide_nothing() -> None:
    assert rank({GRPC: [300e-6, 310e-6, 9e-3], DIRECT: [50e-6, 60e-6, 20e-3]}) == [DIRECT, GRPC]


def test_each_of_two_micro_batches_goes_all_ways_during_the_trial() -> None:
    calls = ways_of(WayTrial([DIRECT, LANE]), 24)
    for batch in (0, 1):
        assert {calls[batch::2].count(way) for way in (GRPC, DIRECT, LANE)} == {4}


def test_the_first_calls_of_a_way_do_not_count() -> None:
    trial = WayTrial([DIRECT, LANE])
    run(trial, {GRPC: 5e-4, DIRECT: 1.0, LANE: 1.0}, WARM_UP_CALLS)
    run(trial, {GRPC: 5e-4, DIRECT: 1e-4, LANE: 2e-4})
    assert set(ways_of(trial)) == {DIRECT}


def test_what_comes_between_two_trials_changes_nothing() -> None:
    trial = tried({GRPC: 5e-4, DIRECT: 2e-4, LANE: 1e-4})
    for way, overhead_s in ((LANE, 1.0), (GRPC, 1e-6), (DIRECT, 1e-6)):
        for _ in range(100):
            trial.observe(way, overhead_s)
    assert set(ways_of(trial)) == {LANE}


def test_a_choice_that_was_wrong_is_mended_by_the_next_trial() -> None:
    trial = tried({GRPC: 5e-4, DIRECT: 9e-4, LANE: 9e-4})
    assert set(ways_of(trial, HELD_CALLS)) == {GRPC}
    run(trial, {GRPC: 5e-4, DIRECT: 2e-4, LANE: 1e-4})
    assert set(ways_of(trial, HELD_CALLS)) == {LANE}
    assert set(ways_of(trial)) == {GRPC, DIRECT, LANE}


def test_what_broke_is_not_tried_again() -> None:
    trial = tried({GRPC: 5e-4, DIRECT: 2e-4, LANE: 1e-4})
    trial.give_up(LANE)
    assert set(ways_of(trial, HELD_CALLS)) == {DIRECT}
    assert set(ways_of(trial)) == {GRPC, DIRECT}
    trial.give_up(DIRECT)
    assert set(ways_of(trial, 2 * HELD_CALLS)) == {GRPC}


def test_the_next_best_follows_a_way_that_broke() -> None:
    trial = tried({GRPC: 5e-4, DIRECT: 2e-4, LANE: 1e-4})
    trial.give_up(LANE)
    assert set(ways_of(trial)) == {DIRECT}
    trial.give_up(DIRECT)
    assert set(ways_of(trial)) == {GRPC}
    trial.give_up(DIRECT)
    assert set(ways_of(trial)) == {GRPC}


def test_a_way_that_was_not_worth_taking_is_not_taken_when_another_breaks() -> None:
    trial = tried({GRPC: 5e-4, DIRECT: 6e-4, LANE: 1e-4})
    trial.give_up(LANE)
    assert set(ways_of(trial)) == {GRPC}


def test_the_rest_is_compared_without_a_way_that_broke_during_the_trial() -> None:
    trial = WayTrial([DIRECT, LANE])
    run(trial, {GRPC: 5e-4, DIRECT: 2e-4, LANE: 1e-4}, WARM_UP_CALLS)
    trial.give_up(LANE)
    assert set(ways_of(trial)) == {GRPC, DIRECT}
    run(trial, {GRPC: 5e-4, DIRECT: 2e-4})
    assert set(ways_of(trial)) == {DIRECT}


def test_a_way_that_breaks_last_ends_the_trial() -> None:
    trial = WayTrial([DIRECT, LANE])
    for _ in range(WARM_UP_CALLS + COMPARED_CALLS):
        trial.observe(GRPC, 5e-4)
        trial.observe(DIRECT, 1e-4)
    trial.give_up(LANE)
    assert set(ways_of(trial)) == {DIRECT}


def test_with_nothing_beside_it_grpcs_own_way_is_taken() -> None:
    assert set(ways_of(WayTrial())) == {GRPC}
