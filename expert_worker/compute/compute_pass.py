"""One pass: several calls of one layer computed together.

Rows that different callers send to the same expert go through one multiplication, and every caller gets its
own rows back. A call whose rows hold NaN or infinity is refused alone; the others are computed. Most passes
hold one call with a few rows, so the overhead around the products is kept to few torch calls: one gathers the
rows, one joins or adds up the answers.

Shapes: D hidden size, R rows of a call's `hidden`, N (row, expert) pairs of a call or of a pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from expert_worker.compute.call import ExpertCall
from expert_worker.experts.expert import Expert, compute_experts, row_dtype
from moesaic.compute.host_copy import to_device, to_host
from moesaic.errors import InvalidArgument, MoesaicError


def compute_calls(calls: Sequence[ExpertCall]) -> list[Tensor | MoesaicError]:
    """For every call its output, or the error that refuses it.

    An output is on the CPU and in the dtype of the call's rows: [N, D], expert by expert, or [R, D], summed
    in fp32 in the order of the call's experts.
    """
    refused = {i: error for i, call in enumerate(calls) if (error := _check_finite(call.hidden)) is not None}
    accepted = [call for i, call in enumerate(calls) if i not in refused]
    answers = iter(to_host(_compute(accepted)))
    return [refused[i] if i in refused else next(answers) for i in range(len(calls))]


def _check_finite(hidden: Tensor) -> MoesaicError | None:
    # A finite sum proves that every number is finite; a sum that is not may also be an overflow of finite
    # numbers. The sum gets a wider dtype only where it would not fit otherwise, because that costs a copy of
    # all rows.
    dtype = torch.float32 if hidden.dtype == torch.float16 else None
    if math.isfinite(hidden.sum(dtype=dtype).item()) or bool(hidden.isfinite().all()):
        return None
    return InvalidArgument("hidden must be finite", field="hidden.data")


def _compute(calls: Sequence[ExpertCall]) -> list[Tensor]:
    """The answer to every call, on the device."""
    if not calls:
        return []
    if len(calls) > 1:
        return _compute_merged(calls)
    (call,) = calls
    gathered = _gather(call.hidden, call.rows, call.experts[0].device, row_dtype(call.experts))
    return [_answer(call, compute_experts(call.experts, gathered, call.counts))]


def _compute_merged(calls: Sequence[ExpertCall]) -> list[Tensor]:
    """The answers to several calls. Rows are computed expert by expert, and for each expert call by call."""
    # A part is the rows of one expert of one call, as indices into the joined rows of all calls; parts are in
    # the order of calls and their experts. `asked` has the parts of every expert.
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
    dtype = row_dtype(experts)
    hidden = torch.cat([call.hidden.to(dtype) for call in calls])
    gathered = _gather(hidden, torch.cat([parts[i] for i in order]), experts[0].device, dtype)
    counts = [sum(len(parts[i]) for i in its_parts) for its_parts in asked.values()]
    computed = compute_experts(experts, gathered, counts).split([len(parts[i]) for i in order])
    output_of = dict(zip(order, computed, strict=True))
    outputs = iter([output_of[i] for i in range(len(parts))])
    return [_answer(call, torch.cat(list(islice(outputs, len(call.experts))))) for call in calls]


def _gather(hidden: Tensor, rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[N, D] on the device and in the dtype of the experts."""
    moved = to_device(hidden, device).to(dtype)
    return moved.index_select(0, to_device(rows, device))


def _answer(call: ExpertCall, outputs: Tensor) -> Tensor:
    """The answer to one call from the outputs [N, D] of its experts, which may be overwritten."""
    if call.weights is None:
        return outputs.to(call.hidden.dtype)
    weighted = outputs.float().mul_(to_device(call.weights, outputs.device)[:, None])
    total = torch.zeros(call.hidden.shape, dtype=torch.float32, device=outputs.device)
    return _add_rows(total, to_device(call.rows, outputs.device), weighted).to(call.hidden.dtype)


def _add_rows(total: Tensor, rows: Tensor, addends: Tensor) -> Tensor:
    """Adds each addend to its row of `total`, in the order of the addends, in place."""
    if total.device.type == "cuda":
        # On CUDA the order of additions in index_add_ is not defined; index_put_ sorts first.
        return total.index_put_((rows,), addends, accumulate=True)
    return total.index_add_(0, rows, addends)
