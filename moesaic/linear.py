"""A weight matrix in the form in which it is read: `Linear` maps rows [n, in] to rows [n, out].

On a CPU a matrix that is only ever read is laid out once for oneDNN, which otherwise does so again in every call. Shared
by experts and by the router's own projections, so that one file decides how a product is computed.
"""

# Shapes: n rows, I inputs, O outputs.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """weight [O, I], no bias."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes
        self._packed = _pack(weight)
        self._weight = None if self._packed is not None else weight

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, I] in the weight's dtype -> [n, O]."""
        if self._packed is None:
            return F.linear(rows, self._weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, None, "none", [], "")
        return product


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's own layout, or None where that is not to be had."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed
