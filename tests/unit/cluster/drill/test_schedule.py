"""Faults come from the seed, hit only whom they may, and end with their turn."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cluster.drill.faults import Act, Fault, Stage, Targets
from cluster.drill.schedule import PACES, QUIET_END, draw_cancels, draw_injections, turn_lengths_s

EXPERTS = {"w0": (0, 1), "w1": (2, 3), "w2": (0, 1), "w3": (2, 3)}
TARGETS = Targets(
    workers={
        name: frozenset((layer, slot) for layer in range(2) for slot in slots)
        for name, slots in EXPERTS.items()
    },
    routers=("router-0", "router-1"),
    control=("controller", "gcs"),
    hosts=("10.0.0.2",),
    poisonable=("w0",),
)


@pytest.mark.parametrize("fault", PACES)
def test_the_same_seed_draws_the_same_faults_and_another_one_draws_others(fault: Fault) -> None:
    drawn = draw_injections(fault, 0, 120.0, 7, TARGETS)
    assert drawn == draw_injections(fault, 0, 120.0, 7, TARGETS)
    assert drawn != draw_injections(fault, 0, 120.0, 8, TARGETS)
    assert drawn != draw_injections(fault, 1, 120.0, 7, TARGETS)


@pytest.mark.parametrize("fault", PACES)
@pytest.mark.parametrize("seconds", [12.0, 60.0, 310.0])
def test_no_two_faults_overlap_and_all_end_before_their_turn(fault: Fault, seconds: float) -> None:
    drawn = draw_injections(fault, 0, seconds, 3, TARGETS)
    assert drawn
    for one, other in pairwise(drawn):
        assert other.at_s >= one.at_s + one.lasts_s + PACES[fault].rest_s[0]
    assert drawn[-1].at_s + drawn[-1].lasts_s <= (1 - QUIET_END) * seconds + 1e-9


def test_a_pair_is_every_worker_that_holds_an_expert() -> None:
    hit = {injection.targets for injection in draw_injections(Fault.PAIR, 0, 300.0, 1, TARGETS)}
    assert hit == {("w0", "w2"), ("w1", "w3")}


def test_a_controllers_fault_kills_and_freezes_both_parts_of_control() -> None:
    drawn = draw_injections(Fault.CONTROLLER, 0, 1000.0, 1, TARGETS)
    assert {(injection.act, injection.targets[0]) for injection in drawn} == {
        (act, name) for act in (Act.KILL, Act.FREEZE) for name in TARGETS.control
    }


def test_the_head_is_down_with_the_controller_once_a_turn() -> None:
    (injection,) = draw_injections(Fault.HEAD, 0, 72.0, 1, TARGETS)
    assert (injection.act, injection.targets, injection.lasts_s) == (Act.DOWN, TARGETS.control, 60.0)


def test_a_change_is_hit_at_any_stage_by_a_death_or_a_stop_of_a_worker_or_a_death_of_control() -> None:
    drawn = draw_injections(Fault.SWAP, 0, 1000.0, 1, TARGETS)
    assert {injection.stage for injection in drawn} == set(Stage)
    assert {(injection.act, injection.targets[0][0]) for injection in drawn} == {
        (Act.KILL, "w"),
        (Act.FREEZE, "w"),
        (Act.KILL, "c"),
        (Act.KILL, "g"),
    }


def test_a_mixture_has_every_act_that_one_host_can_have() -> None:
    drawn = draw_injections(Fault.ALL, 0, 2000.0, 1, TARGETS)
    assert {injection.act for injection in drawn} == {Act.KILL, Act.FREEZE, Act.SLOW}
    assert {name for injection in drawn for name in injection.targets} >= {
        "router-0",
        "controller",
        "gcs",
        "w0",
    }
    assert {injection.stage for injection in drawn} == {None, *Stage}


@pytest.mark.parametrize("fault", [Fault.PARTITION, Fault.NAN, Fault.ROUTER, Fault.HEAD])
def test_where_there_is_nobody_to_hit_nothing_is_drawn(fault: Fault) -> None:
    assert draw_injections(fault, 0, 60.0, 1, Targets(workers=TARGETS.workers)) == ()


def test_a_long_drill_is_cut_into_turns_of_equal_length() -> None:
    assert turn_lengths_s(Fault.KILL, 300.0) == (60.0,) * 5
    assert turn_lengths_s(Fault.SLOW, 300.0) == (300.0,)
    assert turn_lengths_s(Fault.KILL, 20.0) == (20.0,)


def test_the_clients_of_a_round_start_at_moments_of_their_own_and_leave_together() -> None:
    for cancels in draw_cancels(50, 8, 1, 0.5):
        assert len({cancel.leave_s for cancel in cancels}) == 1
        assert all(0 <= cancel.start_s <= cancel.leave_s <= 0.5 for cancel in cancels)
