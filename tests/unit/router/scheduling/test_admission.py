"""Who is let in, by prediction: plain arithmetic over what is open."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.errors import Overloaded
from router.scheduling.admission import (
    DEADLINE_UNREACHABLE,
    QUEUE_FULL,
    Admission,
    AdmissionLimits,
    Backlog,
    Cost,
    refusal,
    wait_s,
    work_s,
)
from router.scheduling.pace import Pace, PaceMeter
from router.scheduling.prefill_budget import PrefillBudget

LIMITS = AdmissionLimits(max_running=4, max_waiting=8)
# A step of four sequences takes 0.4 s, an answer 50 tokens of it: every 5 s one of the four ends.
PACE = Pace(prompt_token_s=0.01, output_token_s=0.1, step_s=0.4, usual_answer=50, longest_answer=80)
COST = Cost(prompt_tokens=100, output_tokens=1000)
ALL_THE_TIME = 1e9


def running(sequences: int, *, unread: int = 0) -> Backlog:
    return Backlog(sequences, unread, 1000 * sequences)


def refused(backlog: Backlog, left_s: float = ALL_THE_TIME, pace: Pace | None = PACE) -> Overloaded | None:
    return refusal(COST, left_s, backlog, pace, LIMITS)


def test_where_a_place_is_free_only_the_prompts_ahead_are_waited_for() -> None:
    assert wait_s(running(3), PACE, max_running=4) == 0
    assert wait_s(running(3, unread=200), PACE, max_running=4) == pytest.approx(2.0)


def test_where_no_place_is_free_usual_answers_have_to_end_first() -> None:
    assert wait_s(running(4), PACE, max_running=4) == pytest.approx(5.0)
    assert wait_s(running(6, unread=200), PACE, max_running=4) == pytest.approx(2.0 + 3 * 5.0)


def test_what_clients_allow_bounds_what_they_are_expected_to_take() -> None:
    assert wait_s(Backlog(4, 0, 4 * 10), PACE, max_running=4) == pytest.approx(1.0)
    assert work_s(Cost(0, 10), PACE, whole_answer=True) == pytest.approx(4.0)


def test_a_first_token_needs_the_prompt_and_a_whole_answer_as_much_as_the_longest() -> None:
    assert work_s(COST, PACE, whole_answer=False) == pytest.approx(1.0)
    assert work_s(COST, PACE, whole_answer=True) == pytest.approx(1.0 + 80 * 0.4)


def test_before_a_pace_is_known_the_number_of_sequences_alone_is_bounded() -> None:
    assert refused(running(11, unread=10**9), left_s=0.001, pace=None) is None
    error = refused(running(12), pace=None)
    assert error is not None and (error.reason, error.retry_after_s) == (QUEUE_FULL, 1.0)


def test_a_full_queue_names_the_whole_seconds_until_the_next_place() -> None:
    error = refused(running(12), pace=replace(PACE, usual_answer=51))
    assert error is not None and (error.reason, error.retry_after_s) == (QUEUE_FULL, 6.0)


def test_where_a_place_is_free_the_first_token_has_to_come_before_the_deadline() -> None:
    assert refused(running(3), left_s=1.01) is None
    error = refused(running(3, unread=200), left_s=1.5)
    assert error is not None and (error.reason, error.retry_after_s) == (DEADLINE_UNREACHABLE, 2.0)
    assert error.message == "the first token is predicted to take 3.0 s, 1.5 s are left until the deadline", (
        "it names both times"
    )


def test_where_it_takes_its_turn_the_whole_answer_has_to_come_before_the_deadline() -> None:
    needed_s = 5.0 + 1.0 + 80 * 0.4
    assert refused(running(4), left_s=needed_s + 0.01) is None
    error = refused(running(4), left_s=needed_s - 0.5)
    assert error is not None and error.reason == DEADLINE_UNREACHABLE
    assert error.message.startswith("the answer is predicted to take 38.0 s, 37.5 s are left")


def test_an_idle_router_refuses_nobody_since_its_figures_may_be_old() -> None:
    assert refused(Backlog(), left_s=0.001) is None


def make_admission(limits: AdmissionLimits = LIMITS) -> Admission:
    """Knows that a prompt's token takes 0.01 s, a step of one sequence 0.1 s, and an answer ten tokens."""
    budget = PrefillBudget(max_batch_tokens=100, max_stall=1.8)
    budget.observe(0, 100, 1.0)
    budget.observe(1, 0, 0.1)
    admission = Admission(limits, PaceMeter(budget))
    admission.note_answer(10)
    admission.note_step(1, 0.1)
    return admission


def test_what_is_open_is_counted_until_it_is_read_and_until_it_ends() -> None:
    admission = make_admission()
    admission.admit("a", COST, ALL_THE_TIME)
    admission.admit("b", Cost(7, 3), ALL_THE_TIME)
    assert admission.backlog == Backlog(2, 107, 1003)
    admission.note_read("a")
    admission.note_read("a")  # again, after it was preempted
    assert admission.backlog == Backlog(2, 7, 1003)
    admission.end("a")
    admission.end("b")
    assert admission.backlog == Backlog()


def test_refusals_are_counted_by_reason_and_leave_nothing_behind() -> None:
    admission = make_admission(AdmissionLimits(max_running=1, max_waiting=1))
    admission.admit("a", COST, ALL_THE_TIME)
    with pytest.raises(Overloaded):
        admission.admit("b", COST, 0.5)
    admission.admit("b", COST, ALL_THE_TIME)
    for name in ("c", "d"):
        with pytest.raises(Overloaded):
            admission.admit(name, COST, ALL_THE_TIME)
    assert admission.refusals == {DEADLINE_UNREACHABLE: 1, QUEUE_FULL: 2}
    assert admission.backlog.sequences == 2


def test_who_waits_is_shed_once_even_the_next_place_would_be_too_late() -> None:
    admission = make_admission(AdmissionLimits(max_running=1, max_waiting=1))
    admission.admit("a", COST, ALL_THE_TIME)
    assert admission.shed("a", 0.1) is None, "a place is free"
    admission.admit("b", COST, ALL_THE_TIME)
    assert admission.shed("b", 2.1) is None
    error = admission.shed("b", 1.9)
    assert error is not None and error.reason == DEADLINE_UNREACHABLE
    assert admission.refusals == {DEADLINE_UNREACHABLE: 1}


def test_without_the_prices_of_steps_nothing_is_predicted() -> None:
    admission = Admission(LIMITS, PaceMeter(PrefillBudget(max_batch_tokens=100, max_stall=1.8)))
    admission.note_answer(5)
    admission.note_step(1, 1.0)
    admission.admit("a", COST, ALL_THE_TIME)
    admission.admit("b", COST, 0.001)
    assert admission.shed("b", 0.0) is None
