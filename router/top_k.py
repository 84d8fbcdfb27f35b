"""An exact top-k: equal scores rank by id, the lowest first, an order that torch.topk does not promise.

Shapes: M rows, W scores a row.
"""

from __future__ import annotations

import torch

_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1


def top_ids(scores: torch.Tensor, ids: torch.Tensor, num: int) -> torch.Tensor:
    """The ids of the `num` highest of float32 scores [M, W], highest first: [M, num]. `ids` is [M, W] or [W].

    One top-k over distinct integer keys: the order of the score above, the inverted id below.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns minus zero into zero
    # The bits of positive floats are ordered as the floats are, those of negative ones in reverse.
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = order.long().bitwise_left_shift_(_ID_BITS).bitwise_or_(_ID_MASK - ids)
    return _ID_MASK - (keys.topk(num, dim=-1).values & _ID_MASK)
