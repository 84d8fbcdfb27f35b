"""Where the rows of a layer land, whichever worker they come from: one for every assignment."""

# Shapes: T tokens, K experts per token, n assignments of one answer, D hidden size.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moesaic.codec import SCALED_DTYPES
from moesaic.tensors import data_of, decode_rows
from router.slot_order import Indices
from router.transport import Answer


class Landing:
    """`rows` [T * K, D] in host memory, in the dtype of the wire, or float32 where that has scales."""

    def __init__(self, rows: Tensor, *, one_token: bool) -> None:
        self.rows = rows
        # A single token has few rows: to copy their bytes costs less than one operation of torch.
        self._bytes = data_of(rows) if one_token else None

    def put(self, assignments: Indices | Sequence[int], answer: Answer) -> None:
        """The rows [n, D] of a checked answer."""
        header = answer.response.output
        if self._bytes is None:
            self.rows.index_copy_(0, _tensor_of(assignments), decode_rows(header, answer.output))
            return
        data = (
            answer.data if header.dtype not in SCALED_DTYPES else data_of(decode_rows(header, answer.output))
        )
        row_bytes = len(self._bytes) // len(self.rows)
        for i, assignment in enumerate(assignments):
            to, start = assignment * row_bytes, i * row_bytes
            self._bytes[to : to + row_bytes] = data[start : start + row_bytes]

    def clear(self, assignments: Indices | Sequence[int]) -> None:
        """Nothing is to come there."""
        self.rows.index_fill_(0, _tensor_of(assignments), 0)

    def of(self, assignments: Indices | Sequence[int]) -> Tensor:
        """What landed there, [n, D]."""
        return self.rows.index_select(0, _tensor_of(assignments))


def _tensor_of(assignments: Indices | Sequence[int]) -> Tensor:
    return torch.from_numpy(np.asarray(assignments, np.int64))
