"""The expert maths against the plain formula, and bit for bit against itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_worker.expert import (
    Expert,
    ExpertForm,
    can_stack,
    choose_form,
    compute_experts,
    empty_stack,
    make_expert,
)
from moesaic.errors import InvalidArgument
from moesaic.settings import ExpertDType

CPU = torch.device("cpu")
FLOAT32 = ExpertForm(CPU, torch.float32)
BFLOAT16 = ExpertForm(CPU, torch.bfloat16)


@dataclass(frozen=True)
class Weights:
    gate_up: Tensor
    down: Tensor

    def plain(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.chunk(2)
        return (F.silu(x.float() @ gate.T) * (x.float() @ up.T)) @ self.down.T


def random_weights(num_experts: int, *, hidden: int = 32, inner: int = 24) -> list[Weights]:
    generator = torch.Generator().manual_seed(7)
    return [
        Weights(
            torch.randn(2 * inner, hidden, generator=generator) / hidden**0.5,
            torch.randn(hidden, inner, generator=generator) / inner**0.5,
        )
        for _ in range(num_experts)
    ]


def make_experts(
    weights: list[Weights], form: ExpertForm = FLOAT32, *, stacked: bool = False
) -> list[Expert]:
    if not stacked:
        return [
            make_expert(one.gate_up.to(form.dtype), one.down.to(form.dtype), "silu", form) for one in weights
        ]
    hidden, inner = weights[0].down.shape
    stack = empty_stack(len(weights), hidden_size=hidden, inner_size=inner, form=form)
    for index, one in enumerate(weights):
        stack.gate_up[index] = one.gate_up
        stack.down[index] = one.down
    return [
        make_expert(stack.gate_up[index], stack.down[index], "silu", form, stack, index)
        for index in range(len(weights))
    ]


def random_rows(num_rows: int, *, hidden: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(seed))


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_every_expert_computes_its_own_rows(counts: list[int], seed: int) -> None:
    weights, rows = random_weights(len(counts)), random_rows(sum(counts), seed=seed)
    computed = compute_experts(make_experts(weights), rows, counts).split(counts)
    for one, x, y in zip(weights, rows.split(counts), computed, strict=True):
        torch.testing.assert_close(y, one.plain(x), atol=1e-5, rtol=1e-5)


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_the_grouped_kernel_agrees_whatever_the_order_of_the_experts(counts: list[int], seed: int) -> None:
    """The kernel that serves CUDA also runs on a CPU; two experts of the stack have no rows."""
    weights, rows = random_weights(len(counts) + 2), random_rows(sum(counts))
    experts = make_experts(weights, stacked=True)
    chosen = random.Random(seed).sample(range(1, len(counts) + 2), len(counts))
    computed = compute_experts([experts[i] for i in chosen], rows, counts).split(counts)
    for i, x, y in zip(chosen, rows.split(counts), computed, strict=True):
        torch.testing.assert_close(y, weights[i].plain(x), atol=1e-5, rtol=1e-5)


def test_experts_of_a_stack_agree_with_themselves_alone() -> None:
    weights, rows = random_weights(3), random_rows(9)
    experts = make_experts(weights, stacked=True)
    grouped = compute_experts(experts, rows, [2, 3, 4]).split([2, 3, 4])
    for expert, x, y in zip(experts, rows.split([2, 3, 4]), grouped, strict=True):
        torch.testing.assert_close(y, expert(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_bfloat16_weights_give_bfloat16_close_to_the_plain_formula(stacked: bool) -> None:
    weights, rows = random_weights(2), random_rows(12).bfloat16()
    computed = compute_experts(make_experts(weights, BFLOAT16, stacked=stacked), rows, [3, 9])
    assert computed.dtype == torch.bfloat16
    for one, x, y in zip(weights, rows.split([3, 9]), computed.split([3, 9]), strict=True):
        torch.testing.assert_close(y.float(), one.plain(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("form", [FLOAT32, BFLOAT16, ExpertForm(CPU, torch.float32, "int8")])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_neighbours_do_not_change_a_single_bit(count: int, form: ExpertForm) -> None:
    # 31 and 23: sizes at which nothing is aligned by chance.
    experts = make_experts(random_weights(3, hidden=31, inner=23), form)
    x = random_rows(count, hidden=31).to(form.dtype)
    alone = compute_experts(experts[1:2], x, [count])
    others = random_rows(11, hidden=31, seed=1).to(form.dtype)
    beside = compute_experts(experts, torch.cat([others[:7], x, others[7:]]), [7, count, 4])
    assert torch.equal(alone, beside[7 : 7 + count])


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
    form: ExpertForm, hidden: int, inner: int
) -> None:
    (expert,) = make_experts(random_weights(1, hidden=hidden, inner=inner), form)
    row = random_rows(1, hidden=hidden, seed=1).to(form.dtype)
    alone = expert(row)
    for count in (2, 3, 7, 16, 17, 33, 70):
        company = random_rows(count, hidden=hidden, seed=count).to(form.dtype)
        for place in {0, 1, count // 2, count - 1}:
            company[place] = row
            assert torch.equal(expert(company)[place], alone[0]), (count, place)


def test_a_cpu_never_stacks() -> None:
    assert not can_stack(BFLOAT16, hidden_size=32, inner_size=24)


def choose(expert_dtype: ExpertDType, dtype: torch.dtype = torch.float32, inner_size: int = 64) -> ExpertForm:
    return choose_form(expert_dtype, CPU, dtype, hidden_size=32, inner_size=inner_size, batch_invariant=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_have_the_compute_dtype_unless_another_is_asked_for(dtype: torch.dtype) -> None:
    assert choose("auto", dtype) == ExpertForm(CPU, dtype)
    assert choose("fp32", dtype) == FLOAT32
    assert choose("bf16", dtype) == BFLOAT16
    assert choose("int8", dtype) == ExpertForm(CPU, dtype, "int8")
    assert choose("int4", dtype) == ExpertForm(CPU, dtype, "int4")


def test_experts_that_int4_cannot_hold_are_refused_by_the_setting() -> None:
    with pytest.raises(InvalidArgument, match="multiples of 32") as caught:
        choose("int4", inner_size=48)
    assert caught.value.field == "expert_dtype"


def test_int4_where_there_is_no_kernel_is_refused_by_the_setting() -> None:
    with pytest.raises(InvalidArgument, match="cuda") as caught:
        choose_form(
            "int4", torch.device("cuda"), torch.bfloat16, hidden_size=32, inner_size=64, batch_invariant=False
        )
    assert caught.value.field == "expert_dtype"
