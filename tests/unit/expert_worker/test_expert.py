"""The expert maths against the plain formula, and bit for bit against itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_worker.expert import Expert, can_stack, compute_experts, empty_experts

CPU = torch.device("cpu")


def random_experts(
    num_experts: int,
    *,
    hidden: int = 32,
    inner: int = 24,
    dtype: torch.dtype = torch.float32,
    stacked: bool = False,
) -> list[Expert]:
    experts = empty_experts(
        num_experts,
        hidden_size=hidden,
        inner_size=inner,
        activation="silu",
        device=CPU,
        dtype=dtype,
        stacked=stacked,
    )
    generator = torch.Generator().manual_seed(7)
    for expert in experts:
        expert.gate_up.copy_(torch.randn(2 * inner, hidden, generator=generator) / hidden**0.5)
        expert.down.copy_(torch.randn(hidden, inner, generator=generator) / inner**0.5)
    return experts


def random_rows(counts: list[int], *, hidden: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, hidden, generator=generator) for count in counts]


def plain(expert: Expert, x: Tensor) -> Tensor:
    gate, up = expert.gate_up.float().split(expert.gate_up.shape[0] // 2)
    x = x.float()
    return (F.silu(x @ gate.T) * (x @ up.T)) @ expert.down.float().T


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_every_expert_computes_its_own_rows(counts: list[int], seed: int) -> None:
    experts, rows = random_experts(len(counts)), random_rows(counts, seed=seed)
    for expert, x, y in zip(experts, rows, compute_experts(experts, rows), strict=True):
        torch.testing.assert_close(y, plain(expert, x), atol=1e-5, rtol=1e-5)


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_grouped_kernel_agrees_whatever_the_order_of_the_experts(
    counts: list[int], order: object
) -> None:
    """The kernel that serves CUDA also runs on a CPU; two experts of the stack have no rows."""
    experts, rows = random_experts(len(counts) + 2, stacked=True), random_rows(counts)
    chosen = experts[1 : len(counts) + 1]
    order.shuffle(chosen)  # type: ignore[attr-defined]
    for expert, x, y in zip(chosen, rows, compute_experts(chosen, rows), strict=True):
        torch.testing.assert_close(y, plain(expert, x), atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_give_bfloat16_close_to_the_plain_formula() -> None:
    for stacked in (False, True):
        experts = random_experts(2, dtype=torch.bfloat16, stacked=stacked)
        rows = [x.bfloat16() for x in random_rows([3, 9])]
        for expert, x, y in zip(experts, rows, compute_experts(experts, rows), strict=True):
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), plain(expert, x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_neighbours_do_not_change_a_single_bit(count: int) -> None:
    # 31 and 23: sizes at which nothing is aligned by chance.
    experts = random_experts(3, hidden=31, inner=23)
    (x,) = random_rows([count], hidden=31)
    (alone,) = compute_experts(experts[1:2], [x])
    beside = compute_experts(
        experts, [*random_rows([7], hidden=31, seed=1), x, *random_rows([4], hidden=31, seed=2)]
    )
    assert torch.equal(alone, beside[1])


def test_separate_experts_have_aligned_memory_of_their_own() -> None:
    experts = random_experts(3, hidden=31, inner=23)
    assert all(weight.data_ptr() % 64 == 0 for expert in experts for weight in (expert.gate_up, expert.down))
    assert [expert.num_bytes for expert in experts] == [3 * 31 * 23 * 4] * 3


def test_stacked_experts_share_one_tensor() -> None:
    first, second = random_experts(2, stacked=True)
    assert first.stack is second.stack and first.stack is not None
    assert torch.equal(first.stack.gate_up[1], second.gate_up)


def test_a_cpu_never_stacks() -> None:
    assert not can_stack(CPU, torch.bfloat16, hidden_size=32, inner_size=24)
