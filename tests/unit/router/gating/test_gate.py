"""The gate: best slots, their weights, what a mask takes away, and what happens when scores tie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.hf_steps import step_of
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moesaic.compute.linear import Linear
from moesaic.families.model import GateRule, Groups
from router.decoders.hf.moe_block import GateModule, RemoteExperts
from router.gating.gate import NO_SLOT, Assignment, Gate, assign, assign_all
from router.phase_clock import PhaseClock

MIXTRAL = GateRule(top_k=2, renormalise=True)
NUM_SLOTS = 8

# One of every kind that a family has.
RULES = {
    "mixtral": MIXTRAL,
    "olmoe": GateRule(3),
    "deepseek_v2": GateRule(2, groups=Groups(4, 2, 1), scale=1.5),
    "deepseek_v3": GateRule(
        *(4, "sigmoid", True, Groups(4, 2, 2)), renormalise=True, epsilon=1e-20, scale=2.5
    ),
    "gpt_oss": GateRule(2, score="logit", weight="softmax", biased=True),
    "phimoe": GateRule(2, score="logit", weight="sparse_mixer", jitter=0.01),
    "llama4": GateRule(1, score="logit", weight="sigmoid", weighs="input"),
}


def rules() -> st.SearchStrategy[GateRule]:
    return st.sampled_from(list(RULES.values()))


def draw_logits(seed: int, num_tokens: int = 6, *, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(num_tokens, NUM_SLOTS, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.round() if ties else logits


def draw_bias(seed: int, rule: GateRule) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(NUM_SLOTS, generator=generator) if rule.selection_bias else None


def per_slot(assignment: Assignment, num_slots: int = NUM_SLOTS) -> torch.Tensor:
    """Weights [T, E], zero where a slot was not chosen."""
    slots = assignment.slots.clamp(min=0)
    return torch.zeros(len(slots), num_slots).scatter_add_(1, slots, assignment.weights)


def draw_gate(rule: GateRule, dtype: torch.dtype, *, exact: bool) -> Gate:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(NUM_SLOTS, 16, generator=generator).to(dtype)
    bias = torch.randn(NUM_SLOTS, generator=generator).to(torch.float32 if exact else dtype)
    return Gate(rule, rows, bias if rule.biased else None, draw_bias(1, rule), exact)


@pytest.mark.parametrize("name", RULES)
def test_a_gate_applies_its_rule_to_the_logits_of_its_rows(name: str) -> None:
    gate, hidden = draw_gate(RULES[name], torch.float32, exact=False), torch.randn(5, 16)
    logits = hidden @ gate.rows.T + (0 if gate.bias is None else gate.bias)  # type: ignore[union-attr]
    torch.testing.assert_close(gate.logits(hidden), logits)
    expected = assign(gate.logits(hidden), RULES[name], selection_bias=gate.selection_bias)
    found = gate.assign(hidden)
    assert torch.equal(found.slots, expected.slots) and torch.equal(found.weights, expected.weights)


def test_an_exact_gate_computes_logits_in_float32_and_any_other_in_the_dtype_of_the_model() -> None:
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, rounded = (draw_gate(RULES["gpt_oss"], torch.bfloat16, exact=exact) for exact in (True, False))
    assert rounded.logits(hidden).dtype == torch.bfloat16
    rows, bias = exact.rows, exact.bias
    assert isinstance(rows, torch.Tensor)
    assert torch.equal(exact.logits(hidden), functional.linear(hidden.float(), rows.float(), bias))


def test_rows_in_a_batch_invariant_form_give_each_token_the_same_bits_alone() -> None:
    rows = torch.randn(NUM_SLOTS, 16, generator=torch.Generator().manual_seed(7))
    gate, hidden = Gate(MIXTRAL, Linear(rows, batch_invariant=True)), torch.randn(9, 16)
    together = gate.logits(hidden)
    assert torch.equal(together, torch.cat([gate.logits(row[None]) for row in hidden]))


def test_a_layer_without_a_gate_gives_every_token_to_its_one_slot() -> None:
    assignment = assign_all(torch.randn(3, 16))
    assert assignment.slots.tolist() == [[0]] * 3
    assert assignment.weights.tolist() == [[1.0]] * 3


def test_equal_scores_choose_the_lowest_slots() -> None:
    assignment = assign(torch.zeros(3, 8), MIXTRAL)
    assert assignment.slots.tolist() == [[0, 1]] * 3
    assert assignment.weights.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_equal_scores_to_the_lowest_slots(name: str) -> None:
    rule = RULES[name]
    bias = torch.zeros(NUM_SLOTS) if rule.selection_bias else None
    for num_tokens in (3, 1000):
        slots = assign(torch.ones(num_tokens, NUM_SLOTS), rule, selection_bias=bias).slots
        assert slots.tolist() == [list(range(rule.top_k))] * num_tokens


def test_weights_of_the_chosen_slots_sum_to_one_when_the_rule_says_so() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert assign(logits, MIXTRAL).weights.sum().item() == pytest.approx(1.0)
    kept = assign(logits, GateRule(top_k=2, renormalise=False)).weights
    torch.testing.assert_close(kept, logits.softmax(-1)[:, :2])


@given(rule=rules(), seed=st.integers(0, 10_000), num_tokens=st.sampled_from([200, 3000]))
def test_many_tokens_are_assigned_as_each_alone_ties_included(
    rule: GateRule, seed: int, num_tokens: int
) -> None:
    logits, bias = draw_logits(seed, num_tokens, ties=True), draw_bias(seed, rule)
    together = assign(logits, rule, selection_bias=bias)
    alone = [assign(row[None], rule, selection_bias=bias) for row in logits[:20]]
    assert torch.equal(together.slots[:20], torch.cat([one.slots for one in alone]))
    assert torch.equal(together.weights[:20], torch.cat([one.weights for one in alone]))


@pytest.mark.parametrize("num_experts", [2, 8, 128])
def test_logits_below_zero_and_minus_zero_are_in_order_among_many(num_experts: int) -> None:
    logits = torch.randn(3000, num_experts, generator=torch.Generator().manual_seed(0)).mul(2).round() - 3
    logits[0, :2] = torch.tensor([0.0, -0.0])
    slots = assign(logits, GateRule(2, score="logit", weight="softmax")).slots
    assert torch.equal(slots, logits.sort(dim=-1, descending=True, stable=True).indices[:, :2])


@given(seed=st.integers(0, 10_000))
def test_choosing_all_slots_is_the_dense_mixture(seed: int) -> None:
    logits = draw_logits(seed)
    for rule, expected in (
        (GateRule(NUM_SLOTS), logits.softmax(-1)),
        (GateRule(NUM_SLOTS, renormalise=True), logits.softmax(-1)),
        (GateRule(NUM_SLOTS, score="logit", weight="softmax"), logits.softmax(-1)),
        (GateRule(NUM_SLOTS, score="sigmoid", scale=2.0), 2 * logits.sigmoid()),
    ):
        torch.testing.assert_close(per_slot(assign(logits, rule)), expected)


@given(rule=rules(), seed=st.integers(0, 10_000))
def test_permuting_the_experts_permutes_their_numbers_and_nothing_else(rule: GateRule, seed: int) -> None:
    logits, bias = draw_logits(seed), draw_bias(seed, rule)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(NUM_SLOTS, generator=generator)
    if rule.groups is not None:
        # Groups stay together, in another order and each in another order.
        width = NUM_SLOTS // rule.groups.count
        order = torch.cat(
            [
                block * width + torch.randperm(width, generator=generator)
                for block in order[order < rule.groups.count]
            ]
        )
    plain = assign(logits, rule, selection_bias=bias)
    permuted = assign(logits[:, order], rule, selection_bias=None if bias is None else bias[order])
    assert torch.equal(order[permuted.slots], plain.slots)
    torch.testing.assert_close(permuted.weights, plain.weights)


@given(rule=rules(), seed=st.integers(0, 10_000), data=st.data())
def test_a_mask_leaves_the_very_assignment_of_a_layer_without_those_slots(
    rule: GateRule, seed: int, data: st.DataObject
) -> None:
    logits, bias = draw_logits(seed), draw_bias(seed, rule)
    width = 1 if rule.groups is None else NUM_SLOTS // rule.groups.count
    # Of whole groups, so that a layer without them can be written down.
    allowed = data.draw(st.sets(st.integers(0, NUM_SLOTS // width - 1), min_size=-(-rule.top_k // width)))
    left = torch.tensor([group * width + place for group in sorted(allowed) for place in range(width)])
    mask = torch.zeros(NUM_SLOTS, dtype=torch.bool)
    mask[left] = True
    groups = rule.groups
    if groups is not None:
        groups = replace(groups, count=len(allowed), keep=min(groups.keep, len(allowed)))
    expected = assign(
        logits[:, left], replace(rule, groups=groups), selection_bias=None if bias is None else bias[left]
    )
    masked = assign(logits, rule, selection_bias=bias, mask=mask)
    assert torch.equal(masked.slots, left[expected.slots])
    torch.testing.assert_close(masked.weights, expected.weights)
    by_row = assign(logits, rule, selection_bias=bias, mask=mask.expand(len(logits), -1))
    assert torch.equal(by_row.slots, masked.slots) and torch.equal(by_row.weights, masked.weights)


@given(rule=rules(), seed=st.integers(0, 10_000), data=st.data())
def test_a_denied_slot_is_never_chosen_and_reaches_no_weight(
    rule: GateRule, seed: int, data: st.DataObject
) -> None:
    logits, bias = draw_logits(seed), draw_bias(seed, rule)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=NUM_SLOTS, max_size=NUM_SLOTS)))
    assignment = assign(logits, rule, selection_bias=bias, mask=mask)
    others = assign(torch.where(mask, logits, logits.flip(0) * 7), rule, selection_bias=bias, mask=mask)
    assert torch.equal(assignment.slots, others.slots) and torch.equal(assignment.weights, others.weights)
    chosen = assignment.slots != NO_SLOT
    assert mask[assignment.slots[chosen]].all()
    assert (assignment.weights[~chosen] == 0).all() and torch.isfinite(assignment.weights).all()
    if rule.groups is None:
        assert (chosen.sum(1) == min(rule.top_k, int(mask.sum()))).all()
    # Slots come first, empty ranks behind.
    assert torch.equal(chosen, chosen.sort(dim=1, descending=True, stable=True).values)
    if rule.renormalise and mask.any():
        torch.testing.assert_close(assignment.weights.sum(1), torch.full((len(logits),), rule.scale))


def test_a_mask_of_its_own_for_every_token_holds_for_that_token_alone() -> None:
    mask = torch.tensor([[True, True, True, True], [False, True, True, False]])
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2)
    assignment = assign(logits, MIXTRAL, mask=mask)
    assert assignment.slots.tolist() == [[0, 1], [1, 2]]
    torch.testing.assert_close(assignment.weights, torch.tensor([[1.0, 0.0], [1.0, 0.0]]).softmax(-1))


# The gates of transformers: class, config, and our rule for it. top_k is 3 unless the family knows no other.
GATES: dict[str, tuple[Any, dict[str, Any], GateRule]] = {
    "mixtral": (MixtralTopKRouter, {}, GateRule(3, renormalise=True)),
    "qwen2_moe": (Qwen2MoeTopKRouter, {"norm_topk_prob": False}, GateRule(3)),
    "qwen3_moe": (Qwen3MoeTopKRouter, {"norm_topk_prob": True}, GateRule(3, renormalise=True)),
    "olmoe": (OlmoeTopKRouter, {}, GateRule(3)),
    "flex_olmo": (FlexOlmoTopKRouter, {"norm_topk_prob": True}, GateRule(3, renormalise=True)),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
        GateRule(3, groups=Groups(4, 2, 1), scale=1.5),
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        replace(RULES["deepseek_v3"], top_k=3),
    ),
    "glm4_moe": (
        Glm4MoeTopkRouter,
        {"n_group": 1, "topk_group": 1},
        GateRule(3, "sigmoid", True, renormalise=True, epsilon=1e-20),
    ),
    "gpt_oss": (GptOssTopKRouter, {}, replace(RULES["gpt_oss"], top_k=3)),
    "phimoe": (PhimoeTopKRouter, {"num_experts_per_tok": 2}, RULES["phimoe"]),
    "granitemoe": (GraniteMoeTopKRouter, {}, GateRule(3, score="logit", weight="softmax")),
    "llama4_text": (Llama4Router, {"num_experts_per_tok": 1}, RULES["llama4"]),
}
EXACT = ("deepseek_v2", "deepseek_v3", "glm4_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", GATES)
def test_the_gate_equals_the_one_of_transformers(family: str, dtype: torch.dtype) -> None:
    kind, overrides, rule = GATES[family]
    count = {"num_experts": 16} if family in ("qwen2_moe", "olmoe", "flex_olmo", "deepseek_v2") else {}
    values = {"num_local_experts": 16, "num_experts_per_tok": 3, "hidden_size": 32, **count, **overrides}
    theirs = kind(AutoConfig.for_model(family, **values)).to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.5 if tensor.dim() > 1 else 0.1))
    remote = RemoteExperts(0, step_of())
    ours = GateModule(16, 32, rule, remote, PhaseClock(), exact=family in EXACT)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    hidden = torch.randn(200, 32, generator=generator).to(dtype)
    with torch.inference_mode():
        weights, slots = ours(hidden)
        their_weights = _weights_per_slot(family, theirs(hidden), 16)
    chosen = their_weights != 0
    ties = _has_ties(ours, hidden) if dtype == torch.bfloat16 else torch.zeros(200, dtype=torch.bool)
    assert (~ties).sum() > 20
    mine = per_slot(Assignment(weights, slots), 16)
    assert torch.equal((mine != 0)[~ties], chosen[~ties])
    # They round weights to what they compute in.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mine[~ties], their_weights[~ties], atol=tolerance, rtol=tolerance)


def _weights_per_slot(family: str, output: tuple[torch.Tensor, ...], num_slots: int) -> torch.Tensor:
    if family == "llama4_text":
        return output[0].float()
    _, weights, slots = output
    return per_slot(Assignment(weights.float(), slots), num_slots)


def _has_ties(gate: GateModule, hidden: torch.Tensor) -> torch.Tensor:
    """Of the tokens [T], those with two equal logits, which bfloat16 makes many: theirs promise no order among them."""
    logits = torch.nn.functional.linear(hidden, gate.weight, gate.bias)
    ranked = logits.float().sort(dim=-1).values
    return (ranked[:, 1:] == ranked[:, :-1]).any(dim=-1)
