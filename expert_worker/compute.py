"""One pass: several calls of one layer computed together.

Rows that different callers send to the same expert go through one multiplication, and every caller gets back its own.
A call whose rows hold NaN or infinity is refused alone; the others go on.
"""

# Shapes: D hidden size, R rows of a call's `hidden`, n rows of one expert in one call.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from expert_worker.call import Call
from expert_worker.expert import Expert, compute_experts
from moesaic.errors import InvalidArgument, MoesaicError


def compute_calls(calls: Sequence[Call]) -> list[Tensor | MoesaicError]:
    """For every call its output, in the dtype of its rows and on the CPU, or why it is refused.

    Output: [sum of n, D], expert by expert, or [R, D] summed in fp32 in the order of the call's experts.
    """
    refused = {i: error for i, call in enumerate(calls) if (error := _check_finite(call.hidden)) is not None}
    accepted = [call for i, call in enumerate(calls) if i not in refused]
    combined = iter(_compute(accepted) if accepted else ())
    return [refused[i] if i in refused else next(combined) for i in range(len(calls))]


def _check_finite(hidden: Tensor) -> MoesaicError | None:
    # Two numbers tell: the extremes of a tensor with NaN are NaN.
    if all(extreme.isfinite().item() for extreme in torch.aminmax(hidden)):
        return None
    return InvalidArgument("hidden must be finite", field="hidden.data")


def _compute(calls: Sequence[Call]) -> list[Tensor]:
    parts: dict[Expert, list[Tensor]] = defaultdict(list)
    for call in calls:
        device = call.groups[0].expert.down.device
        hidden = call.hidden.to(device)
        for group in call.groups:
            parts[group.expert].append(hidden.index_select(0, group.rows.to(device)))
    experts = list(parts)
    rows = [_join(parts[expert], expert.down.dtype) for expert in experts]
    outputs = {
        expert: iter(torch.split(output, [len(part) for part in parts[expert]]))
        for expert, output in zip(experts, compute_experts(experts, rows), strict=True)
    }
    # Every expert's parts were joined in the order of the calls, so each call takes the next one.
    return [_combine(call, [next(outputs[group.expert]) for group in call.groups]) for call in calls]


def _join(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).to(dtype)


def _combine(call: Call, outputs: Sequence[Tensor]) -> Tensor:
    """One call's answer from the outputs [n, D] of its groups."""
    if not call.combine_sum:
        return torch.cat(list(outputs)).to(call.hidden.dtype).cpu()
    device = outputs[0].device
    total = torch.zeros(call.hidden.shape, dtype=torch.float32, device=device)
    for group, output in zip(call.groups, outputs, strict=True):
        assert group.weights is not None
        weights = group.weights.to(device)
        total.index_add_(0, group.rows.to(device), output.float() * weights[:, None])
    return total.to(call.hidden.dtype).cpu()
