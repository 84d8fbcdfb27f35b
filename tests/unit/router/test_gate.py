"""The gate: best slots, their weights, and what happens when scores tie."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from moesaic.families import GateRule
from router.gate import assign
from router.phases import PhaseClock
from router.stock_decoder import Gate

MIXTRAL = GateRule(top_k=2, renormalise=True)


def test_equal_scores_choose_the_lowest_slots() -> None:
    assignment = assign(torch.zeros(3, 8), MIXTRAL)
    assert assignment.slots.tolist() == [[0, 1]] * 3
    assert assignment.weights.tolist() == [[0.5, 0.5]] * 3


def test_weights_of_the_chosen_slots_sum_to_one_when_the_rule_says_so() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert assign(logits, MIXTRAL).weights.sum().item() == pytest.approx(1.0)
    kept = assign(logits, GateRule(top_k=2, renormalise=False)).weights
    torch.testing.assert_close(kept, logits.softmax(-1)[:, :2])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_gate_equals_the_one_of_transformers(top_k: int) -> None:
    config = MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=top_k)
    theirs = MixtralTopKRouter(config)
    torch.nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(0))
    ours = Gate(theirs.weight.detach(), GateRule(top_k, renormalise=True), PhaseClock())
    hidden = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    for mine, reference in zip(ours(hidden), theirs(hidden), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("num_experts", [2, 8, 128])
def test_many_tokens_are_assigned_as_each_alone_ties_included(num_experts: int) -> None:
    logits = torch.randn(3000, num_experts, generator=torch.Generator().manual_seed(0)).mul(2).round()
    rule = GateRule(top_k=2, renormalise=True)
    together = assign(logits, rule)
    alone = [assign(row[None], rule) for row in logits[:200]]
    assert torch.equal(together.slots[:200], torch.cat([one.slots for one in alone]))
    assert torch.equal(together.weights[:200], torch.cat([one.weights for one in alone]))
    assert (together.slots[:, 0] < num_experts).all()
