"""A pass on a GPU, mostly seen without one: on a device of fake tensors no operation mixes that device with the host or looks
at a number, and the grouped kernel takes the strides that it is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from expert_worker.compute import compute_pass as compute
from expert_worker.compute.call import ExpertCall
from expert_worker.experts import expert
from expert_worker.experts.expert import (
    ExpertForm,
    StackRow,
    compute_experts,
    empty_weights,
    make_expert,
)
from moesaic.families.model import ExpertModule

# Not the host, and without numbers. In a build of torch without CUDA a fake `cuda` cannot even be indexed.
DEVICE = torch.device("meta")
HIDDEN, INNER = 32, 64
MODULES = [
    ExpertModule(HIDDEN, INNER, "silu"),
    ExpertModule(HIDDEN, INNER, "gelu_new", gated=False, biased=True),
    ExpertModule(HIDDEN, INNER, "clamped_swiglu", biased=True, limit=7.0),
]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of pinned memory plain copies, which are noted: the only ways to the device and back."""
    noted: list[str] = []

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        noted.append("to device")
        return tensor.to(device)

    def to_host(tensors: list[Tensor]) -> list[Tensor]:
        noted.append("to host")
        return [tensor.to("cpu") for tensor in tensors]

    monkeypatch.setattr(compute, "to_device", to_device)
    monkeypatch.setattr(expert, "to_device", to_device)
    monkeypatch.setattr(compute, "to_host", to_host)
    # Rows are looked at on the host, where they are numbers.
    monkeypatch.setattr(compute, "_check_finite", lambda hidden: None)
    return noted


@pytest.mark.parametrize("num_stacks", [0, 1, 2])
@pytest.mark.parametrize("combine_sum", [False, True])
@pytest.mark.parametrize("slots", [[(0, 2)], [(2, 0), (1, 2)]])
@pytest.mark.parametrize("module", MODULES)
def test_a_pass_stays_on_the_device_and_comes_back_once(
    copies: list[str], num_stacks: int, combine_sum: bool, slots: list[tuple[int, ...]], module: ExpertModule
) -> None:
    with FakeTensorMode():
        form = ExpertForm(DEVICE, torch.bfloat16)
        stacks = [empty_weights(module, form, 3) for _ in range(max(1, num_stacks))]
        rows = [StackRow(stacks[index % len(stacks)], index) for index in range(3)]
        experts = [make_expert(row.weights, module, form, row if num_stacks else None) for row in rows]
        calls = [
            ExpertCall(
                layer=0,
                hidden=torch.empty(4, HIDDEN, dtype=torch.bfloat16),
                experts=[experts[slot] for slot in of_call],
                counts=[2] * len(of_call),
                rows=torch.tensor([0, 3] * len(of_call)),
                weights=torch.ones(2 * len(of_call)) if combine_sum else None,
                deadline_s=0.0,
            )
            for of_call in slots
        ]
        answers = compute.compute_calls(calls)
    assert all(
        isinstance(answer, Tensor) and (answer.device.type, answer.shape) == ("cpu", (4, HIDDEN))
        for answer in answers
    )
    assert copies.count("to host") == 1 and copies[-1] == "to host"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("counts", [[1, 0, 1, 0], [0, 0, 0, 5], [3, 17, 1, 64]])
@pytest.mark.parametrize("module", MODULES)
def test_the_grouped_kernel_of_a_gpu_agrees_with_one_product_after_another(
    counts: list[int], module: ExpertModule
) -> None:
    form = ExpertForm(torch.device("cuda"), torch.bfloat16)
    stack = empty_weights(module, form, 4)
    generator = torch.Generator("cuda").manual_seed(0)
    for weight in (stack.up, stack.down, stack.up_bias, stack.down_bias):
        if weight is not None:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    rows = torch.randn(sum(counts), HIDDEN, device="cuda", generator=generator).bfloat16()

    def computed(grouped: bool) -> Tensor:
        experts = [
            make_expert(stack[slot], module, form, StackRow(stack, slot) if grouped else None)
            for slot, count in enumerate(counts)
            if count
        ]
        return compute_experts(experts, rows, [count for count in counts if count]).float()

    apart = computed(False)
    assert (computed(True) - apart).norm() <= 2e-2 * apart.norm()
