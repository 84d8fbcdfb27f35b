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

TIMEOUT_S = 30.0

# The largest difference from the expected answers that is rounding, relative to their largest absolute value. float32:
# sums of some thousand products in another order. bfloat16: 8 bits of mantissa, rounded in weights, rows, the inner
# rows and the answer. int8: half a step of 1/127 for each of weights and rows in two products, measured up to 2.6e-2
# on random experts. int4: half a step of 1/15 of a group's range, measured up to 1.7e-1.
_FLOAT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_TOLERANCE: dict[WeightForm, float] = {"int8": 6e-2, "int4": 4e-1}


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
