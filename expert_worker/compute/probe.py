"""Probes: whether an expert that is held answers as its bundle says, computed as callers' rows are.

Shapes: P probe vectors, D hidden size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.experts.expert import Expert, ExpertForm
from moesaic.compute.linear import WeightForm
from moesaic.families import MoeModel

TIMEOUT_S = 30.0
_ANY_ROWS = 4

# The largest difference from the expected answers that is rounding, relative to their largest absolute value: at least
# twice what random experts of 64 to 4096 inputs showed against float64, which were 1e-6 in float32 (another order of
# sums leaves room for more), 7e-3 in bfloat16, 4e-2 in int8 and 1.6e-1 in int4. Weights of another expert differ by 1.
_FLOAT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_TOLERANCE: dict[WeightForm, float] = {"int8": 8e-2, "int4": 4e-1}


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The largest absolute difference from the expected answers, and the largest absolute value of these."""

    ok: bool
    max_difference: float
    max_expected: float


def tolerance(form: ExpertForm) -> float:
    """The largest relative difference that counts as equal in this form."""
    return _FLOAT_TOLERANCE[form.dtype] if form.weights == "float" else _TOLERANCE[form.weights]


def compare(answers: Tensor, expected: Tensor, form: ExpertForm) -> ProbeResult:
    """Answers [P, D] against the expected ones. NaN is never right."""
    difference = (answers.float() - expected).abs().max().item()
    largest = expected.abs().max().item()
    # A comparison with NaN is false.
    return ProbeResult(difference <= tolerance(form) * largest, difference, largest)


def any_rows(model: MoeModel) -> Tensor:
    """Rows [P, D] for an expert without probe vectors, always the same."""
    return torch.randn(_ANY_ROWS, model.hidden_size, generator=torch.Generator().manual_seed(0))


async def probe(expert: Expert, layer: int, inputs: Tensor, batcher: Batcher) -> Tensor:
    """The answers [P, D] to probe vectors [P, D], computed on the compute thread in a pass as any other."""
    call = ExpertCall(
        layer=layer,
        hidden=inputs,
        experts=[expert],
        counts=[len(inputs)],
        rows=torch.arange(len(inputs)),
        weights=None,
        deadline_s=time.monotonic() + TIMEOUT_S,
    )
    return (await batcher.submit(call)).output
