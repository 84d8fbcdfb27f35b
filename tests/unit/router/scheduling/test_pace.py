"""The moving figures from which waits are predicted."""

from __future__ import annotations

import pytest

from router.scheduling.pace import NUM_ANSWERS, NUM_STEPS, Pace, PaceMeter
from router.scheduling.prefill_budget import PrefillBudget


def make_meter() -> tuple[PaceMeter, PrefillBudget]:
    budget = PrefillBudget(max_batch_tokens=100, max_stall=1.8)
    return PaceMeter(budget), budget


def known() -> PaceMeter:
    """A prompt's token takes 0.01 s, a step of four sequences 0.4 s."""
    meter, budget = make_meter()
    budget.observe(0, 100, 1.0)
    budget.observe(4, 0, 0.4)
    return meter


def pace_of(meter: PaceMeter) -> Pace:
    pace = meter.pace()
    assert pace is not None
    return pace


def test_nothing_is_known_until_prompts_steps_and_answers_are() -> None:
    meter, budget = make_meter()
    budget.observe(0, 100, 1.0)
    meter.note_step(0, 1.0)
    meter.note_answer(5, is_whole=True)
    assert meter.pace() is None, "nothing was decoded yet"
    budget.observe(4, 0, 0.4)
    meter.note_step(4, 0.4)
    assert meter.pace() == Pace(0.01, 0.1, 0.4, 5.0, 5)


def test_a_step_counts_with_the_prompts_that_were_read_in_it() -> None:
    meter = known()
    meter.note_answer(1, is_whole=True)
    meter.note_step(4, 0.4)
    meter.note_step(4, 0.8)
    pace = pace_of(meter)
    assert (pace.output_token_s, pace.step_s) == (pytest.approx(0.1), pytest.approx(0.6))


def test_answers_that_are_cut_off_make_the_usual_one_longer_not_shorter() -> None:
    meter = known()
    meter.note_step(4, 0.4)
    meter.note_answer(10, is_whole=True)
    meter.note_answer(30, is_whole=True)
    assert (pace_of(meter).usual_answer, pace_of(meter).longest_answer) == (20, 30)
    meter.note_answer(50, is_whole=False)
    assert (pace_of(meter).usual_answer, pace_of(meter).longest_answer) == (45, 50)


def test_it_stays_known_while_every_answer_is_cut_off() -> None:
    meter = known()
    meter.note_step(4, 0.4)
    for _ in range(NUM_ANSWERS):
        meter.note_answer(3, is_whole=False)
    assert pace_of(meter).usual_answer == 3 * NUM_ANSWERS


def test_what_is_long_ago_counts_no_more() -> None:
    meter = known()
    meter.note_step(4, 100.0)
    meter.note_answer(1000, is_whole=True)
    for _ in range(NUM_STEPS):
        meter.note_step(4, 0.4)
    for _ in range(NUM_ANSWERS):
        meter.note_answer(2, is_whole=True)
    pace = pace_of(meter)
    assert (pace.step_s, pace.usual_answer, pace.longest_answer) == (pytest.approx(0.4), 2, 2)
