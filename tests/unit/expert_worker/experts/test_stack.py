"""Rows of stacks: what is loaded later lies beside the others, and a row comes back with the last one who uses it.

The kernel that serves CUDA also runs on a CPU, in float32 and with rows of whole 16 bytes.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from expert_worker.experts import expert as expert_module
from expert_worker.experts import stack as stack_module
from expert_worker.experts.expert import Expert, ExpertForm, compute_experts, make_expert
from expert_worker.experts.stack import ExpertStacks, Place
from moesaic.families.model import ExpertModule

FORM = ExpertForm(torch.device("cpu"), torch.float32)
MODULE = ExpertModule(32, 24, "silu")
OTHER = ExpertModule(32, 40, "silu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stacks are made here as on CUDA; the number of experts in each grouped pass is noted."""
    monkeypatch.setattr(stack_module, "can_stack", lambda form, module: True)
    noted: list[int] = []
    grouped = expert_module._compute_grouped

    def note(stack: object, experts: list[Expert], rows: Tensor, counts: list[int]) -> Tensor:
        indices = [one.row.index for one in experts]  # type: ignore[attr-defined]
        if indices == sorted(indices):
            noted.append(len(experts))
        return grouped(stack, experts, rows, counts)  # type: ignore[arg-type]

    monkeypatch.setattr(expert_module, "_compute_grouped", note)
    return noted


def load(stacks: ExpertStacks, count: int, module: ExpertModule = MODULE, layer: int = 0) -> list[Expert]:
    stacks.reserve(layer, module, count)
    return [fill(stacks.place(layer, module), module, seed) for seed in range(count)]


def fill(place: Place, module: ExpertModule, seed: int) -> Expert:
    weights, generator = place.memory(module, FORM), torch.Generator().manual_seed(seed)
    for weight in (weights.up, weights.down):
        weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return make_expert(weights, module, FORM, place.row)


def check(experts: list[Expert]) -> None:
    """That a pass gives what each expert gives by itself."""
    counts = [1 + i % 3 for i in range(len(experts))]
    rows = torch.randn(sum(counts), 32, generator=torch.Generator().manual_seed(9))
    computed = compute_experts(experts, rows, counts).split(counts)
    for expert, x, y in zip(experts, rows.split(counts), computed, strict=True):
        torch.testing.assert_close(y, expert(x), atol=1e-5, rtol=1e-5)


def test_a_version_that_takes_a_spare_row_keeps_the_one_grouped_pass(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM, spare_rows=1)
    experts = load(stacks, 3)
    assert stacks.num_free(0, MODULE) == 1
    (later,) = load(stacks, 1)
    check([experts[1], later, experts[0]])
    assert kernels == [3]
    assert stacks.num_free(0, MODULE) == 0


def test_without_a_spare_row_a_pass_is_split_by_stack_and_not_by_expert(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM)
    experts, later = load(stacks, 3), load(stacks, 2)
    check([later[0], experts[2], later[1], experts[0], experts[1]])
    assert sorted(kernels) == [2, 3]


def test_an_expert_without_a_stack_is_computed_beside_those_of_one(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM)
    alone = fill(Place(), MODULE, seed=5)
    experts = load(stacks, 2)
    check([experts[1], alone, experts[0]])
    assert kernels == [2]


def test_experts_of_another_size_have_a_stack_of_their_own(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM, spare_rows=2)
    experts, larger = load(stacks, 2), load(stacks, 2, OTHER)
    check([larger[1], experts[0], larger[0], experts[1]])
    assert kernels == [2, 2]
    assert (stacks.num_free(0, MODULE), stacks.num_free(0, OTHER)) == (2, 0)


def test_a_row_comes_back_when_the_last_call_with_its_expert_has_ended(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM)
    experts = load(stacks, 2)
    in_flight = experts.pop()
    assert stacks.num_free(0, MODULE) == 0
    del in_flight
    gc.collect()
    assert stacks.num_free(0, MODULE) == 1
    (later,) = load(stacks, 1)
    check([later, *experts])
    assert kernels == [2]


def test_a_row_whose_load_failed_comes_back(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM)
    stacks.reserve(0, MODULE, 1)

    def fail() -> None:
        place = stacks.place(0, MODULE)
        assert place.row is not None
        raise ValueError

    with pytest.raises(ValueError):
        fail()
    gc.collect()
    assert stacks.num_free(0, MODULE) == 1


def test_stacks_that_were_made_for_versions_which_are_gone_go_with_them(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM, spare_rows=1)
    experts, later = load(stacks, 2), load(stacks, 4)
    del later
    gc.collect()
    assert stacks.num_free(0, MODULE) == 4
    stacks.drop_empty()
    assert stacks.num_free(0, MODULE) == 1
    del experts
    gc.collect()
    stacks.drop_empty()
    assert stacks.num_free(0, MODULE) == 3  # the model's own stack stays


def test_rows_come_back_from_any_thread(kernels: list[int]) -> None:
    stacks = ExpertStacks(FORM)
    experts = load(stacks, 8)
    threads = [threading.Thread(target=experts.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stacks.num_free(0, MODULE) == 8


def test_where_nothing_can_be_stacked_every_expert_has_memory_of_its_own() -> None:
    stacks = ExpertStacks(FORM, spare_rows=3)
    experts = load(stacks, 2)
    assert [expert.row for expert in experts] == [None, None]  # type: ignore[attr-defined]
    assert stacks.num_free(0, MODULE) == 0
    check(experts)
