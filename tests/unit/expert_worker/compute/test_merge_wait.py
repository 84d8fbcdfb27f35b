"""Waiting for other callers: only for those that are expected, only while it pays, and never alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from expert_worker.compute.merge_wait import FORGET_S, MergeWait

PASS_S = 0.010
# Two joined calls cost hardly more than one.
JOINED_S = 0.011
NUM_LAYERS = 4


class History:
    """Two routers that walk through the layers in turn, each with its own pause between an answer and the next call."""

    def __init__(self, *, max_wait_s: float = 1.0, joined_s: float = JOINED_S) -> None:
        self.rule = MergeWait(max_wait_s)
        self.now_s = 100.0
        self.rule.passed(1, PASS_S)
        self.rule.passed(2, joined_s)

    def step(self, callers: Sequence[str], layer: int, pauses_s: Sequence[float]) -> None:
        """One layer, joined: each caller comes after its pause, all are answered together."""
        answered_s = self.now_s
        for caller, pause_s in zip(callers, pauses_s, strict=True):
            self.rule.came(caller, layer, answered_s + pause_s)
        self.now_s = answered_s + max(pauses_s) + JOINED_S
        for caller in callers:
            self.rule.left(caller, self.now_s)

    def walk(self, callers: Sequence[str], pauses_s: Sequence[float], steps: int = 5 * NUM_LAYERS) -> None:
        for step in range(steps):
            self.step(callers, step % NUM_LAYERS, pauses_s)

    def wait_s(self, layer: int, waiting: Sequence[str], after_s: float) -> float:
        """How long the first caller waits, that comes `after_s` after the last answer."""
        since_s = self.now_s + after_s
        for caller in waiting:
            self.rule.came(caller, layer, since_s)
        return max(0.0, self.rule.until(layer, set(waiting), since_s, since_s) - since_s)


def test_alone_a_call_never_waits() -> None:
    history = History()
    history.walk(["a"], [0.001])
    assert history.wait_s(0, ["a"], 0.001) == 0.0


def test_without_history_nobody_is_waited_for() -> None:
    history = History()
    history.rule.came("b", 0, history.now_s)
    history.rule.left("b", history.now_s)
    assert history.wait_s(0, ["a"], 0.001) == 0.0


def test_a_caller_that_always_comes_soon_after_is_waited_for_just_so_long() -> None:
    history = History()
    history.walk(["a", "b"], [0.001, 0.003])
    assert history.wait_s(0, ["a"], 0.001) == pytest.approx(0.002, abs=1e-4)


def test_a_caller_that_is_there_already_is_not_waited_for() -> None:
    history = History()
    history.walk(["a", "b"], [0.001, 0.003])
    assert history.wait_s(0, ["a", "b"], 0.003) == 0.0


def test_a_caller_that_asks_for_another_layer_next_is_not_waited_for() -> None:
    history = History()
    history.walk(["a", "b"], [0.001, 0.003])
    assert history.wait_s(2, ["a"], 0.001) == 0.0


def test_a_caller_that_is_overdue_is_not_waited_for() -> None:
    history = History()
    history.walk(["a", "b"], [0.001, 0.003])
    assert history.wait_s(0, ["a"], 0.004) == 0.0


def test_a_caller_that_is_being_served_is_not_waited_for() -> None:
    history = History()
    history.walk(["a", "b"], [0.001, 0.003])
    history.rule.came("b", 0, history.now_s + 0.001)
    history.rule.until(0, {"b"}, history.now_s + 0.001, history.now_s + 0.001)
    assert history.wait_s(0, ["a"], 0.0015) == 0.0


def test_half_a_pass_is_the_most_that_pays() -> None:
    history = History()
    history.walk(["a", "b"], [0.001, 0.012])
    assert history.wait_s(0, ["a"], 0.001) == 0.0


def test_where_a_joined_pass_costs_as_much_as_two_nobody_waits() -> None:
    history = History(joined_s=2 * PASS_S)
    history.walk(["a", "b"], [0.001, 0.0015])
    assert history.wait_s(0, ["a"], 0.001) == 0.0


@pytest.mark.parametrize(("max_wait_s", "waits"), [(0.0, False), (0.001, False), (0.003, True)])
def test_no_wait_is_longer_than_its_bound(max_wait_s: float, waits: bool) -> None:
    history = History(max_wait_s=max_wait_s)
    history.walk(["a", "b"], [0.001, 0.003])
    assert (history.wait_s(0, ["a"], 0.001) > 0.0) == waits


def test_a_caller_whose_pauses_vary_is_given_its_usual_leeway() -> None:
    history = History()
    for step in range(20 * NUM_LAYERS):
        history.step(["a", "b"], step % NUM_LAYERS, [0.001, 0.002 + 0.001 * (step // NUM_LAYERS % 2)])
    assert 0.0015 < history.wait_s(0, ["a"], 0.001) < 0.004


def test_a_caller_that_stopped_is_forgotten() -> None:
    history = History()
    history.walk(["a", "b"], [0.001, 0.003])
    history.now_s += 2 * FORGET_S
    assert history.wait_s(0, ["a"], 0.001) == 0.0
    history.rule.came("c", 0, history.now_s)
    history.rule.left("b", history.now_s)  # nobody knows it any more
