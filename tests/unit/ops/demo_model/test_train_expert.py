"""What an expert for arithmetic is trained on, and how its gate is held back."""

from __future__ import annotations

import pytest
import torch
from train_expert import Tokens, answer_digits, gate_loss, only_last_slot

# The ids of a vocabulary of four: a digit, an equals sign, a space, anything else.
DIGIT, EQUALS, SPACE, OTHER = range(4)
TOKENS = Tokens(
    digit=torch.tensor([True, False, False, False]),
    equals=torch.tensor([False, True, False, False]),
    space=torch.tensor([False, False, True, False]),
)


def test_only_the_digits_right_after_an_equals_sign_are_an_answer() -> None:
    ids = torch.tensor([[DIGIT, OTHER, DIGIT, EQUALS, SPACE, DIGIT, DIGIT, OTHER, DIGIT]])

    assert answer_digits(ids, TOKENS).nonzero()[:, 1].tolist() == [5, 6]


def test_the_gate_costs_nothing_when_the_newcomer_is_chosen_by_the_wanted_rows_alone() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0, 4.0], [3.0, 2.0, 0.0, 0.5]])  # the newcomer last

    assert gate_loss(logits, torch.tensor([True, False]), top_k=2, margin=1.0) == 0.0


@pytest.mark.parametrize(("wanted", "cost"), [(True, 2.5), (False, 0.0)])
def test_a_row_costs_what_the_newcomer_is_short_of_the_margin(wanted: bool, cost: float) -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0, 0.5]])

    assert gate_loss(logits, torch.tensor([wanted]), top_k=2, margin=1.0) == cost


def test_the_gradient_of_the_base_is_zero() -> None:
    gradient = only_last_slot(torch.ones(3, 2))

    assert gradient.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
