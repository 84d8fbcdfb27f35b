"""The activation of an expert, between its two products: [n, W] -> [n, F].

Shapes: n rows, F inner size, W outputs of the first product: 2F with a gate (gate outputs before up outputs),
else F.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import InvalidArgument
from moesaic.families.model import ExpertModule

# An activation may overwrite its argument. Its result is contiguous.
Activation = Callable[[Tensor], Tensor]

# The slope of the sigmoid in quick_gelu and in the gate of gpt-oss.
_SLOPE = 1.702


def choose_activation(module: ExpertModule, *, row_by_row: bool = False) -> Activation:
    """The activation of a module. With `row_by_row` the bits of a row do not depend on the rows beside it.

    Raises InvalidArgument for an activation that is not known.
    """
    if module.activation == "clamped_swiglu":
        if not module.gated or module.limit is None:
            raise InvalidArgument("activation: clamped_swiglu needs a gate and a limit", field="activation")
        return partial(_clamped_swiglu, limit=module.limit)
    function = _ELEMENTWISE.get(module.activation)
    if function is None:
        raise InvalidArgument(f"activation: {module.activation[:64]!r} is not known", field="activation")
    if module.gated:
        return partial(_gated, function)
    return partial(_row_by_row, function) if row_by_row else function


def _gated(function: Activation, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return function(gate).mul_(up)


def _clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return _quick_gelu(gate.clamp_(max=limit)).mul_(up.clamp_(-limit, limit).add_(1))


def _row_by_row(function: Activation, rows: Tensor) -> Tensor:
    return function(_apart(rows, rows.dtype))


def _apart(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the rows with a gap behind each.

    An elementwise kernel treats adjoining rows as one long vector, and computes exp() of the last numbers of
    a vector in another way than of those before. Rows with gaps are computed one by one, and so are the two
    halves of gated rows.
    """
    return rows.new_empty(len(rows), rows.shape[1] + 1, dtype=dtype)[:, :-1].copy_(rows)


def _gelu(rows: Tensor) -> Tensor:
    # torch's own gelu treats rows as one long vector even where there are gaps.
    share = _apart(rows, torch.float32).mul_(math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
    return (share * rows).to(rows.dtype)


def _quick_gelu(rows: Tensor) -> Tensor:
    share = _apart(rows, torch.float32).mul_(_SLOPE).sigmoid_()
    return (share * rows).to(rows.dtype)


def _relu2(rows: Tensor) -> Tensor:
    return F.relu(rows).square_()


_gelu_tanh = partial(F.gelu, approximate="tanh")

_ELEMENTWISE: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
}
