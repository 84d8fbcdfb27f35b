"""The expert maths against the plain formula, and bit for bit against itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_worker.experts.expert import (
    Expert,
    ExpertForm,
    ExpertWeights,
    StackRow,
    can_stack,
    choose_form,
    compute_experts,
    empty_weights,
    make_expert,
)
from moesaic.compute.linear import WeightForm
from moesaic.errors import InvalidArgument
from moesaic.families.model import ACTIVATIONS, ExpertModule
from moesaic.settings import ExpertDType

CPU = torch.device("cpu")
FLOAT32 = ExpertForm(CPU, torch.float32)
BFLOAT16 = ExpertForm(CPU, torch.bfloat16)
Kind = Callable[[int, int], ExpertModule]


def kind(activation: str, *, gated: bool = True, biased: bool = False, limit: float | None = None) -> Kind:
    return partial(ExpertModule, activation=activation, gated=gated, biased=biased, limit=limit)


SILU = kind("silu")
# Of every form that an expert has: with a gate or without, with biases or without.
KINDS = {
    "gated": SILU,
    "gated with biases": kind("gelu", biased=True),
    "plain": kind("relu", gated=False),
    "plain with biases": kind("gelu_new", gated=False, biased=True),
    "gpt-oss": kind("clamped_swiglu", biased=True, limit=0.7),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": F.relu,
}


def plain(weights: ExpertWeights, module: ExpertModule, x: Tensor) -> Tensor:
    """The formula as it is written, in float32."""
    up = F.linear(x.float(), weights.up, weights.up_bias)
    if not module.gated:
        inner = FORMULAS[module.activation](up)
    else:
        gate, up = up.chunk(2, dim=-1)
        if module.limit is None:
            inner = FORMULAS[module.activation](gate) * up
        else:
            gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
            inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return F.linear(inner, weights.down, weights.down_bias)


def random_weights(num_experts: int, module: ExpertModule) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    width, inner = module.inner_size * (2 if module.gated else 1), module.inner_size
    return [
        ExpertWeights(
            random(width, module.hidden_size),
            random(module.hidden_size, inner),
            random(width) * width**0.5 if module.biased else None,
            random(module.hidden_size) * module.hidden_size**0.5 if module.biased else None,
        )
        for _ in range(num_experts)
    ]


def make_experts(
    weights: list[ExpertWeights], module: ExpertModule, form: ExpertForm = FLOAT32, *, stacked: bool = False
) -> list[Expert]:
    stack = empty_weights(module, form, len(weights))
    for index, one in enumerate(weights):
        for target, weight in zip(tensors(stack[index]), tensors(one), strict=True):
            target.copy_(weight)
    return [
        make_expert(stack[index], module, form, StackRow(stack, index) if stacked else None)
        for index in range(len(weights))
    ]


def tensors(weights: ExpertWeights) -> list[Tensor]:
    every = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return [weight for weight in every if weight is not None]


def random_rows(num_rows: int, *, hidden: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(seed))


@every_kind
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_every_expert_computes_its_own_rows(kind: Kind, counts: list[int], seed: int) -> None:
    module = kind(32, 24)
    weights, rows = random_weights(len(counts), module), random_rows(sum(counts), seed=seed)
    computed = compute_experts(make_experts(weights, module), rows, counts).split(counts)
    for one, x, y in zip(weights, rows.split(counts), computed, strict=True):
        torch.testing.assert_close(y, plain(one, module, x), atol=1e-5, rtol=1e-5)


@every_kind
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_the_grouped_kernel_agrees_whatever_the_order_of_the_experts(
    kind: Kind, counts: list[int], seed: int
) -> None:
    """The kernel that serves CUDA also runs on a CPU; two experts of the stack have no rows."""
    module = kind(32, 24)
    weights, rows = random_weights(len(counts) + 2, module), random_rows(sum(counts))
    experts = make_experts(weights, module, stacked=True)
    chosen = random.Random(seed).sample(range(1, len(counts) + 2), len(counts))
    computed = compute_experts([experts[i] for i in chosen], rows, counts).split(counts)
    for i, x, y in zip(chosen, rows.split(counts), computed, strict=True):
        torch.testing.assert_close(y, plain(weights[i], module, x), atol=1e-5, rtol=1e-5)


@every_kind
def test_experts_of_a_stack_agree_with_themselves_alone(kind: Kind) -> None:
    module = kind(32, 24)
    experts, rows = make_experts(random_weights(3, module), module, stacked=True), random_rows(9)
    grouped = compute_experts(experts, rows, [2, 3, 4]).split([2, 3, 4])
    for expert, x, y in zip(experts, rows.split([2, 3, 4]), grouped, strict=True):
        torch.testing.assert_close(y, expert(x), atol=1e-5, rtol=1e-5)


@every_kind
@pytest.mark.parametrize("stacked", [False, True])
def test_bfloat16_weights_give_bfloat16_close_to_the_plain_formula(kind: Kind, stacked: bool) -> None:
    module = kind(32, 24)
    weights, rows = random_weights(2, module), random_rows(12).bfloat16()
    computed = compute_experts(make_experts(weights, module, BFLOAT16, stacked=stacked), rows, [3, 9])
    assert computed.dtype == torch.bfloat16
    for one, x, y in zip(weights, rows.split([3, 9]), computed.split([3, 9]), strict=True):
        torch.testing.assert_close(y.float(), plain(one, module, x), atol=0.06, rtol=0.06)


@every_kind
@pytest.mark.parametrize(("form", "limit"), [("int8", 0.03), ("int4", 0.2)])
def test_quantised_weights_stay_within_their_error(kind: Kind, form: WeightForm, limit: float) -> None:
    module = kind(64, 128)
    (weights,), rows = random_weights(1, module), random_rows(8, hidden=64)
    (expert,) = make_experts([weights], module, ExpertForm(CPU, torch.float32, form))
    expected = plain(weights, module, rows)
    assert (expert(rows).float() - expected).norm() / expected.norm() < limit


@every_kind
@pytest.mark.parametrize("form", [FLOAT32, BFLOAT16, ExpertForm(CPU, torch.float32, "int8")])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_neighbours_do_not_change_a_single_bit(kind: Kind, count: int, form: ExpertForm) -> None:
    # 31 and 23: sizes at which nothing is aligned by chance.
    module = kind(31, 23)
    experts = make_experts(random_weights(3, module), module, form)
    x = random_rows(count, hidden=31).to(form.dtype)
    alone = compute_experts(experts[1:2], x, [count])
    others = random_rows(11, hidden=31, seed=1).to(form.dtype)
    beside = compute_experts(experts, torch.cat([others[:7], x, others[7:]]), [7, count, 4])
    assert torch.equal(alone, beside[7 : 7 + count])


@every_kind
@pytest.mark.parametrize(
    "form",
    [
        ExpertForm(CPU, torch.float32, batch_invariant=True),
        ExpertForm(CPU, torch.bfloat16, batch_invariant=True),
        ExpertForm(CPU, torch.float32, "int8", batch_invariant=True),
    ],
)
@pytest.mark.parametrize(("hidden", "inner"), [(31, 23), (64, 1100)])
def test_a_batch_invariant_expert_gives_a_row_the_same_bits_in_any_company(
    kind: Kind, form: ExpertForm, hidden: int, inner: int
) -> None:
    assert_batch_invariant(kind(hidden, inner), form)


@every_kind
def test_and_so_does_one_of_four_bits(kind: Kind) -> None:
    assert_batch_invariant(kind(64, 1056), ExpertForm(CPU, torch.float32, "int4", batch_invariant=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"clamped_swiglu"}))
def test_and_so_does_one_of_any_activation(activation: str, gated: bool) -> None:
    module = ExpertModule(31, 1101, activation, gated=gated)
    assert_batch_invariant(module, ExpertForm(CPU, torch.float32, batch_invariant=True))


def assert_batch_invariant(module: ExpertModule, form: ExpertForm) -> None:
    (expert,) = make_experts(random_weights(1, module), module, form)
    row = random_rows(1, hidden=module.hidden_size, seed=1).to(form.dtype)
    alone = expert(row)
    for count in (2, 3, 7, 16, 17, 33, 70):
        company = random_rows(count, hidden=module.hidden_size, seed=count).to(form.dtype)
        for place in {0, 1, count // 2, count - 1}:
            company[place] = row
            assert torch.equal(expert(company)[place], alone[0]), (count, place)


def test_a_cpu_never_stacks() -> None:
    assert not can_stack(BFLOAT16, SILU(32, 24))


def choose(expert_dtype: ExpertDType, dtype: torch.dtype = torch.float32, inner_size: int = 64) -> ExpertForm:
    modules = [SILU(32, 64), SILU(32, inner_size)]
    return choose_form(expert_dtype, CPU, dtype, modules, batch_invariant=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_have_the_compute_dtype_unless_another_is_asked_for(dtype: torch.dtype) -> None:
    assert choose("auto", dtype) == ExpertForm(CPU, dtype)
    assert choose("fp32", dtype) == FLOAT32
    assert choose("bf16", dtype) == BFLOAT16
    assert choose("int8", dtype) == ExpertForm(CPU, dtype, "int8")
    assert choose("int4", dtype) == ExpertForm(CPU, dtype, "int4")


def test_experts_that_int4_cannot_hold_are_refused_by_the_setting() -> None:
    """Those of any layer: here the second's."""
    with pytest.raises(InvalidArgument, match="multiples of 32") as caught:
        choose("int4", inner_size=48)
    assert caught.value.field == "expert_dtype"


def test_int4_where_there_is_no_kernel_is_refused_by_the_setting() -> None:
    with pytest.raises(InvalidArgument, match="cuda") as caught:
        choose_form("int4", torch.device("cuda"), torch.bfloat16, [SILU(32, 64)], batch_invariant=False)
    assert caught.value.field == "expert_dtype"
