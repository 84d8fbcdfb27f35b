"""The sums that an expert for arithmetic learns from and is asked."""

from __future__ import annotations

from sums import Sum, all_sums, held_out_sums, training_sums, without


def test_a_sum_is_text_with_its_question_in_front() -> None:
    assert Sum(12, "+", 7).text == "12 + 7 = 19"
    assert Sum(12, "-", 7).text == "12 - 7 = 5"


def test_no_sum_has_a_negative_result() -> None:
    assert all(int(s.answer) >= 0 for s in all_sums())


def test_a_held_out_sum_is_never_among_those_to_learn_from() -> None:
    held_out = held_out_sums()

    assert len(held_out) == len(all_sums()) // 10
    assert set(held_out).isdisjoint(training_sums(50_000, held_out, seed=3))


def test_the_same_seed_holds_the_same_sums_out() -> None:
    assert held_out_sums() == held_out_sums()
    assert held_out_sums(seed=1) != held_out_sums()


def test_a_problem_that_works_out_a_held_out_sum_is_left_out() -> None:
    problems = ["Anna has some.\nAnswer: 12 + 7 = 19.", "12 + 8 = 20", "112 + 7 = 119"]

    assert without([Sum(12, "+", 7)], problems) == ["12 + 8 = 20", "112 + 7 = 119"]
