"""One pass: several calls of one layer computed together.

Rows that different callers send to the same expert go through one multiplication, and every caller gets back its own.
A call whose rows hold NaN or infinity is refused alone; the others go on. Most passes hold one call with a few rows, so
what is done around the products is counted in torch calls: one to gather the rows, one to join or to add up the answers.
"""

# Shapes: D hidden size, R rows of a call's `hidden`, N (row, expert) pairs of a call or of a pass.

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from expert_worker.compute.call import ExpertCall
from expert_worker.experts.expert import Expert, compute_experts
from moesaic.compute.host_copy import to_device, to_host
from moesaic.errors import InvalidArgument, MoesaicError


def compute_calls(calls: Sequence[ExpertCall]) -> list[Tensor | MoesaicError]:
    """For every call its output, in the dtype of its rows and on the CPU, or why it is refused.

    Output: [N, D], expert by expert, or [R, D] summed in fp32 in the order of the call's experts.
    """
    refused = {i: error for i, call in enumerate(calls) if (error := _check_finite(call.hidden)) is not None}
    accepted = [call for i, call in enumerate(calls) if i not in refused]
    answers = iter(to_host(_compute(accepted)))
    return [refused[i] if i in refused else next(answers) for i in range(len(calls))]


def _check_finite(hidden: Tensor) -> MoesaicError | None:
    # A sum is finite only if every number is; finite numbers may still add up to more than float32 holds.
    # A dtype of its own is named where the sum would not fit: it costs a copy of all rows.
    dtype = torch.float32 if hidden.dtype == torch.float16 else None
    if math.isfinite(hidden.sum(dtype=dtype).item()) or bool(hidden.isfinite().all()):
        return None
    return InvalidArgument("hidden must be finite", field="hidden.data")


def _compute(calls: Sequence[ExpertCall]) -> list[Tensor]:
    """For every call its answer, on the device."""
    if not calls:
        return []
    if len(calls) > 1:
        return _compute_merged(calls)
    (call,) = calls
    gathered = _gather(call.hidden, call.rows, call.experts[0])
    return [_answer(call, compute_experts(call.experts, gathered, call.counts))]


def _compute_merged(calls: Sequence[ExpertCall]) -> list[Tensor]:
    """Expert by expert, and for each expert call by call."""
    # Call by call and expert by expert, which rows of those of all calls; and by expert, which of these parts are its.
    parts: list[Tensor] = []
    asked: defaultdict[Expert, list[int]] = defaultdict(list)
    first_row = 0
    for call in calls:
        for expert, rows in zip(call.experts, (call.rows + first_row).split(list(call.counts)), strict=True):
            asked[expert].append(len(parts))
            parts.append(rows)
        first_row += len(call.hidden)
    experts = list(asked)
    order = [i for its_parts in asked.values() for i in its_parts]
    hidden = torch.cat([call.hidden.to(experts[0].dtype) for call in calls])
    gathered = _gather(hidden, torch.cat([parts[i] for i in order]), experts[0])
    counts = [sum(len(parts[i]) for i in its_parts) for its_parts in asked.values()]
    computed = compute_experts(experts, gathered, counts).split([len(parts[i]) for i in order])
    output_of = dict(zip(order, computed, strict=True))
    outputs = iter([output_of[i] for i in range(len(parts))])
    return [_answer(call, torch.cat(list(islice(outputs, len(call.experts))))) for call in calls]


def _gather(hidden: Tensor, rows: Tensor, expert: Expert) -> Tensor:
    """[N, D] on the device and in the dtype of the experts."""
    moved = to_device(hidden, expert.device).to(expert.dtype)
    return moved.index_select(0, to_device(rows, expert.device))


def _answer(call: ExpertCall, outputs: Tensor) -> Tensor:
    """One call's answer from the outputs [N, D] of its experts, which are its own to overwrite."""
    if call.weights is None:
        return outputs.to(call.hidden.dtype)
    weighted = outputs.float().mul_(to_device(call.weights, outputs.device)[:, None])
    total = torch.zeros(call.hidden.shape, dtype=torch.float32, device=outputs.device)
    return _add_rows(total, to_device(call.rows, outputs.device), weighted).to(call.hidden.dtype)


def _add_rows(total: Tensor, rows: Tensor, addends: Tensor) -> Tensor:
    """Adds each row to the one it belongs to, in their order, in place."""
    if total.device.type == "cuda":
        # There index_add_ adds in whatever order the device comes to it; this one sorts first.
        return total.index_put_((rows,), addends, accumulate=True)
    return total.index_add_(0, rows, addends)
