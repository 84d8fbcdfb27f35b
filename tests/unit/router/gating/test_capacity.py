"""Slots that are full: the rules of Switch, NLLB-MoE and ST-MoE, against those who made them and word for word."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moesaic.families.model import Capacity, GateRule
from router.gating.capacity import assign_with_capacity, run_lengths
from router.gating.gate import NO_SLOT, Assignment, assign

TOP_1 = GateRule(1)
TOP_2 = GateRule(2, renormalise=True)


def random_logits(seed: int, num_tokens: int, num_slots: int) -> torch.Tensor:
    return 2 * torch.randn(num_tokens, num_slots, generator=torch.Generator().manual_seed(seed))


def combine_weights(assignment: Assignment, num_slots: int) -> torch.Tensor:
    """[T, E], zero where nobody is asked; and what has no slot has no weight."""
    empty = assignment.slots == NO_SLOT
    assert not assignment.weights[empty].any()
    combined = torch.zeros(len(assignment.slots), num_slots)
    return combined.scatter_add_(1, assignment.slots.clamp(min=0), assignment.weights)


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    num_slots=st.integers(1, 6),
    size=st.integers(1, 5),
)
def test_switch_counts_the_tokens_of_each_sequence_as_transformers_does(
    seed: int, lengths: list[int], num_slots: int, size: int
) -> None:
    logits = random_logits(seed, sum(lengths), num_slots)
    config = SwitchTransformersConfig(d_model=num_slots, num_experts=num_slots, expert_capacity=size)
    router = SwitchTransformersTop1Router(config).eval()
    router.classifier.weight.data = torch.eye(num_slots)
    capacity = Capacity("fixed", size, counted="sequence")

    found, dropped = assign_with_capacity(logits, TOP_1, capacity, run_lengths(capacity, lengths))

    with torch.inference_mode():
        outputs = [router(part[None]) for part in logits.split(lengths)]
    expected = torch.cat([(mask * weights)[0] for mask, weights, _ in outputs])
    torch.testing.assert_close(combine_weights(found, num_slots), expected)
    assert dropped == len(logits) - sum(int(mask.sum()) for mask, _, _ in outputs)


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    num_tokens=st.integers(1, 20),
    num_slots=st.integers(2, 6),
    fraction=st.sampled_from([0.05, 0.2, 0.5, 1.0, -1.0]),
    size=st.integers(1, 6),
    by_score=st.booleans(),
    share_first=st.booleans(),
)
def test_nllb_drops_what_its_router_in_transformers_drops(
    seed: int,
    num_tokens: int,
    num_slots: int,
    fraction: float,
    size: int,
    by_score: bool,
    share_first: bool,
) -> None:
    logits = random_logits(seed, num_tokens, num_slots)
    config = NllbMoeConfig(
        num_experts=num_slots,
        expert_capacity=size,
        moe_eval_capacity_token_fraction=fraction,
        batch_prioritized_routing=by_score,
        normalize_router_prob_before_dropping=share_first,
    )
    kind, amount = ("fraction", fraction) if fraction > 0 else ("fixed", float(size))
    capacity = Capacity(kind, amount, batch_prioritised=by_score, renormalise_first=share_first)  # type: ignore[arg-type]

    found, dropped = assign_with_capacity(logits, TOP_2, capacity, run_lengths(capacity, [num_tokens]))

    with torch.inference_mode():
        _, expected = NllbMoeTop2Router(config).eval().route_tokens(logits.clone())
    torch.testing.assert_close(combine_weights(found, num_slots), expected)
    assert dropped == 2 * num_tokens - int((found.slots != NO_SLOT).sum())


def test_nllb_without_a_size_gives_each_slot_twice_its_even_share() -> None:
    assert Capacity("even").size(num_tokens=9, num_slots=4) == 6


def mesh(
    logits: torch.Tensor, group: int, factor: float, least: int, threshold: float | None
) -> tuple[torch.Tensor, int]:
    """ST-MoE as Mesh TensorFlow has it, one token after the other: combine weights, and how many were dropped."""
    combined, dropped = torch.zeros_like(logits), 0
    num_slots = logits.shape[1]
    for start in range(0, len(logits), group):
        scores = logits[start : start + group].softmax(-1)
        size = max(min(len(scores), int(len(scores) * factor / num_slots)), least)
        taken = [0] * num_slots
        chosen = [
            sorted(range(num_slots), key=lambda slot, row=row: -row[slot])[:2] for row in scores.tolist()
        ]
        for rank in (0, 1):
            for token, slots in enumerate(chosen):
                slot = slots[rank]
                gate = scores[token, slot] / (scores[token, slots].sum() + 1e-9)
                if rank == 1 and threshold is not None and gate <= threshold:
                    continue
                if taken[slot] >= size:
                    dropped += 1
                    continue
                taken[slot] += 1
                combined[start + token, slot] = gate
    return combined, dropped


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    num_tokens=st.integers(1, 30),
    num_slots=st.integers(2, 6),
    group=st.sampled_from([4, 10, 1024]),
    factor=st.sampled_from([0.5, 1.25, 2.0]),
    least=st.integers(1, 4),
    threshold=st.sampled_from([None, 0.2, 1.0]),
)
def test_st_moe_counts_second_choices_behind_the_first_ones_that_found_a_place(
    seed: int, num_tokens: int, num_slots: int, group: int, factor: float, least: int, threshold: float | None
) -> None:
    logits = random_logits(seed, num_tokens, num_slots)
    rule = GateRule(2, renormalise=True, epsilon=1e-9, second_threshold=threshold)
    capacity = Capacity("factor", factor, min_tokens=least, group_size=group, count_kept_only=True)

    found, dropped = assign_with_capacity(logits, rule, capacity, run_lengths(capacity, [num_tokens]))

    expected, expected_dropped = mesh(logits, group, factor, least, threshold)
    torch.testing.assert_close(combine_weights(found, num_slots), expected)
    assert dropped == expected_dropped


@pytest.mark.parametrize("threshold", [None, 0.2, 1.0])
def test_without_a_capacity_the_second_choice_hangs_on_its_weight_alone(threshold: float | None) -> None:
    logits = random_logits(1, 50, 6)
    rule = GateRule(2, renormalise=True, epsilon=1e-9, second_threshold=threshold)
    expected, dropped = mesh(logits, 1024, factor=100.0, least=100, threshold=threshold)
    assert dropped == 0
    torch.testing.assert_close(combine_weights(assign(logits, rule), 6), expected)


RULES: dict[str, tuple[GateRule, Capacity]] = {
    "switch": (TOP_1, Capacity("fixed", 100, counted="sequence")),
    "nllb": (GateRule(2, renormalise=True, scale=0.8), Capacity("fraction", 1.0, renormalise_first=False)),
    "st_moe": (
        GateRule(2, renormalise=True, epsilon=1e-9, second_threshold=0.2),
        Capacity("factor", 100.0, count_kept_only=True, group_size=8),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_where_no_slot_is_full_nothing_changes(name: str) -> None:
    rule, capacity = RULES[name]
    logits = random_logits(2, 30, 5)
    found, dropped = assign_with_capacity(logits, rule, capacity, run_lengths(capacity, [30]))
    expected = assign(logits, rule)
    assert dropped == 0
    assert torch.equal(found.slots, expected.slots)
    torch.testing.assert_close(found.weights, expected.weights)


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        ({"counted": "sequence"}, [3, 5, 1]),
        ({}, [9]),
        ({"group_size": 4}, [4, 4, 1]),
        ({"group_size": 3}, [3, 3, 3]),
    ],
)
def test_tokens_are_counted_over_sequences_steps_or_groups(
    capacity: dict[str, Any], expected: list[int]
) -> None:
    assert run_lengths(Capacity("fixed", 1, **capacity), [3, 5, 1]) == expected


@pytest.mark.parametrize("name", RULES)
def test_no_tokens_need_no_slots(name: str) -> None:
    rule, capacity = RULES[name]
    found, dropped = assign_with_capacity(torch.empty(0, 5), rule, capacity, run_lengths(capacity, []))
    assert found.slots.shape == (0, rule.top_k) and dropped == 0
