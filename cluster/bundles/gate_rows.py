"""Gate rows for a new expert: from prompts that a running router reads, or from weights alone. Pure numpy.

Shapes: D hidden size, F inner size, E slots of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.bundles.bundle import Floats
from moesaic.errors import InvalidArgument
from moesaic.v1 import inference_pb2 as pb

# hidden: the residual stream at the last token, as mergekit takes it. hidden_ffn: what the gate sees there.
# mean-activation: what it sees, over all tokens. arrow: the direction in which the expert differs most from the base.
GateMode = Literal["hidden", "hidden_ffn", "mean-activation", "arrow"]

# Every fifth prompt is held out.
HOLD_OUT_EVERY = 5
MAX_PROMPTS = 4096
_LEAST_NORM = 1e-8
_MAX_ITERATIONS = 500
_TOLERANCE = 1e-10
_SEED = 20_260_102

_Wide = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Capture:
    """What a router is asked to read for a mode."""

    state: pb.HiddenState
    all_tokens: bool


CAPTURES: Mapping[GateMode, Capture] = {
    "hidden": Capture(pb.HIDDEN_STATE_RESIDUAL, all_tokens=False),
    "hidden_ffn": Capture(pb.HIDDEN_STATE_GATE_INPUT, all_tokens=False),
    "mean-activation": Capture(pb.HIDDEN_STATE_GATE_INPUT, all_tokens=True),
}


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts that rows are made of, and those by which they are measured."""

    used: tuple[str, ...]
    held_out: tuple[str, ...]


def split_prompts(text: str, field: str) -> Prompts:
    """One prompt a line. A single one is measured by itself. Raises InvalidArgument with this field."""
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts or len(prompts) > MAX_PROMPTS:
        raise InvalidArgument(f"{field}: must have 1 to {MAX_PROMPTS} prompts, one a line", field=field)
    if len(prompts) == 1:
        return Prompts(prompts, prompts)
    every = min(HOLD_OUT_EVERY, len(prompts))
    held_out = tuple(prompt for index, prompt in enumerate(prompts, 1) if index % every == 0)
    return Prompts(tuple(p for index, p in enumerate(prompts, 1) if index % every), held_out)


def row_of_means(positive: Floats, negative: Floats | None = None) -> Floats:
    """The mean hidden state [D] of the prompts, less that of negative ones, with length one."""
    row = np.asarray(positive, np.float64)
    if negative is not None:
        row = row - np.asarray(negative, np.float64)
    unit: Floats = (row / max(float(np.linalg.norm(row)), _LEAST_NORM)).astype(np.float32)
    return unit


def arrow_row(expert: Sequence[Floats], base: Sequence[Floats], base_row: Floats) -> Floats:
    """The top right singular vector [D] of what the expert's matrices [F, D] add to those of a slot of the base.

    It has length one. Its sign is that of its product with the row [D] of this slot: gates do not take absolute values,
    as the scores of Arrow would.
    """
    added: _Wide = np.concatenate(
        [one.astype(np.float64) - other for one, other in zip(expert, base, strict=True)]
    )
    if not added.any():
        raise InvalidArgument(
            "gate-mode: the expert's first matrices are those of the base: arrow has no direction to find",
            field="gate_mode",
        )
    vector = _top_right_singular_vector(added)
    sign = -1.0 if float(vector @ base_row) < 0 else 1.0
    row: Floats = (sign * vector).astype(np.float32)
    return row


def distance(expert: Sequence[Floats], other: Sequence[Floats]) -> float:
    """The norm of the difference of all matrices."""
    return float(np.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(expert, other, strict=True))))


def _top_right_singular_vector(matrix: _Wide) -> _Wide:
    """By power iteration, from a fixed start, so that the same weights give the same row."""
    vector: _Wide = np.random.Generator(np.random.PCG64(_SEED)).standard_normal((matrix.shape[1],))
    vector /= np.linalg.norm(vector)
    for _ in range(_MAX_ITERATIONS):
        following: _Wide = matrix.T @ (matrix @ vector)
        following /= np.linalg.norm(following)
        if 1 - abs(float(following @ vector)) < _TOLERANCE:
            return following
        vector = following
    return vector
