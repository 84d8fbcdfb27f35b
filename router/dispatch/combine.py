"""Where the answers of a layer land, whichever worker they come from, and what they come to.

Whatever lands is copied at once: an answer's bytes are its transport's. Everything lies in host memory and goes to the
device that the model runs on as a whole.
"""

# Shapes: T tokens, K experts per token, D hidden size, n assignments and R tokens of one worker.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moesaic.wire.tensor_check import SCALED_DTYPES
from moesaic.wire.tensors import data_of, decode_rows
from router.dispatch.host_staging import Staging
from router.dispatch.row_grouping import Indices, Part, SlotOrder
from router.workers.transports.base import WorkerAnswer


class Landing(Protocol):
    """Every part has to be put or cleared before the total is right."""

    def put(self, part: Part, answer: WorkerAnswer) -> None:
        """Takes a checked answer."""
        ...

    def clear(self, part: Part) -> None:
        """Nothing came, or nothing of use."""
        ...

    def of(self, part: Part) -> Tensor:
        """What landed of a part, [n or R, D]."""
        ...

    def total(self) -> Tensor:
        """What everything that landed adds up to, [T, D] float32 on the device."""
        ...

    def looks_finite(self, total: Tensor) -> bool:
        """One look at all numbers: whatever is not finite among them shows in their sum. On a GPU they are looked at
        where they landed, while it adds them up: a look at `total` would wait for it."""
        ...


class RowLanding:
    """COMBINE_ROWS: a row for every assignment, added up by rank in float32. Neither placement nor the order of arrival
    reaches the total."""

    def __init__(
        self, staging: Staging, order: SlotOrder, weights: Tensor, width: int, dtype: torch.dtype
    ) -> None:
        """weights [T, K] on the device; `dtype` is that of the rows as they are decoded."""
        self._staging = staging
        self._weights = weights
        self._rows = staging.empty((weights.numel(), width), dtype)  # [T * K, D]
        # A single token has few rows: to copy their bytes costs less than one operation of torch.
        self._bytes = data_of(self._rows) if order.num_tokens == 1 else None
        if len(order.empty):
            self._clear(order.empty)

    def put(self, part: Part, answer: WorkerAnswer) -> None:
        header = answer.response.output
        if self._bytes is None:
            self._rows.index_copy_(0, _tensor_of(part.assignments), decode_rows(header, answer.output))
            return
        data = (
            answer.data if header.dtype not in SCALED_DTYPES else data_of(decode_rows(header, answer.output))
        )
        row_bytes = len(self._bytes) // len(self._rows)
        for i, assignment in enumerate(part.assignments):
            to, start = assignment * row_bytes, i * row_bytes
            self._bytes[to : to + row_bytes] = data[start : start + row_bytes]

    def clear(self, part: Part) -> None:
        self._clear(part.assignments)

    def of(self, part: Part) -> Tensor:
        return self._rows.index_select(0, _tensor_of(part.assignments))

    def total(self) -> Tensor:
        return combine(self._staging.to_device(self._rows).view(*self._weights.shape, -1), self._weights)

    def looks_finite(self, total: Tensor) -> bool:
        return _is_sum_finite(total if total.device.type == "cpu" else self._rows)

    def _clear(self, assignments: Indices | list[int]) -> None:
        # What never lands must not reach other tokens: attention multiplies it by zero.
        self._rows.index_fill_(0, _tensor_of(assignments), 0)


class SumLanding:
    """COMBINE_SUM: what each worker's experts add up to, a row for every token that it was sent. The sums are added in
    the order in which they were put: placement reaches the last bits."""

    def __init__(self, staging: Staging, hidden: Tensor) -> None:
        """`hidden` [T, D] is what the layer is computed of."""
        self._staging = staging
        self._shape, self._device = hidden.shape, hidden.device
        # By the first of its places, which no two parts share: [R, D] float32.
        self._sums: dict[int, tuple[Part, Tensor]] = {}

    def put(self, part: Part, answer: WorkerAnswer) -> None:
        rows = decode_rows(answer.response.output, answer.output)
        sums = self._staging.empty((len(rows), rows.shape[1]), torch.float32).copy_(rows)
        self._sums[part.places[0]] = part, sums

    def clear(self, part: Part) -> None:
        self._sums.pop(part.places[0], None)

    def of(self, part: Part) -> Tensor:
        return self._sums[part.places[0]][1]

    def total(self) -> Tensor:
        total = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        for part, sums in self._sums.values():
            on_device = self._staging.to_device(sums)
            if part.tokens is None:
                total += on_device
            else:
                total.index_add_(0, torch.from_numpy(part.tokens).to(self._device), on_device)
        return total

    def looks_finite(self, total: Tensor) -> bool:
        if total.device.type == "cpu":
            return _is_sum_finite(total)
        return all(_is_sum_finite(sums) for _, sums in self._sums.values())


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """rows [T, K, D], weights [T, K] float32 -> [T, D] float32, rank by rank."""
    ranks = zip(rows.unbind(1), weights.unsqueeze(-1).unbind(1), strict=True)
    rows_of_first, its_weights = next(ranks)
    total = rows_of_first * its_weights
    for rows_of_rank, its_weights in ranks:
        total += rows_of_rank * its_weights
    return total


def _is_sum_finite(rows: Tensor) -> bool:
    return math.isfinite(rows.sum().item())


def _tensor_of(assignments: Indices | Sequence[int]) -> Tensor:
    return torch.from_numpy(np.asarray(assignments, np.int64))
