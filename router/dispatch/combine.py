"""The combine half of an MoE layer: the answers of the workers, collected and added up.

An answer is copied as soon as it arrives, because its bytes belong to its transport. All answers are
collected in host memory and go to the model's device together.

Shapes: T tokens, K experts per token, D hidden size, n assignments and R tokens of one worker.
"""

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
from router.dispatch.row_grouping import Indices, RowsBySlot, WorkerRows
from router.workers.transports.base import WorkerAnswer


class Combiner(Protocol):
    """Collects the answers of a layer. The result is valid once all rows have been added or cleared."""

    # Whether an answer is a sum over the experts of its worker, so that these cannot be told apart.
    mixes_experts: bool

    def add(self, rows: WorkerRows, answer: WorkerAnswer) -> None:
        """Copies a checked answer."""
        ...

    def clear(self, rows: WorkerRows) -> None:
        """Leaves these rows out of the result: there is no answer, or a wrong one."""
        ...

    def outputs_of(self, rows: WorkerRows) -> Tensor:
        """The answer that was added for these rows, [n or R, D]."""
        ...

    def result(self) -> Tensor:
        """The sum of everything that was added, [T, D] float32 on the device."""
        ...

    def looks_finite(self, result: Tensor) -> bool:
        """Checks all numbers at once: any of them that is not finite shows in their sum. On a GPU the check
        reads the answers in host memory while the GPU adds them up, since reading `result` would wait for the
        GPU."""
        ...


class RowCombiner:
    """COMBINE_ROWS: one row per assignment, added up by rank in float32. Neither the placement nor the order
    of arrival affects the result."""

    mixes_experts = False

    def __init__(
        self, staging: Staging, groups: RowsBySlot, weights: Tensor, width: int, dtype: torch.dtype
    ) -> None:
        """`weights` [T, K] are on the device; `dtype` is that of the decoded rows."""
        self._staging = staging
        self._weights = weights
        self._outputs = staging.empty((weights.numel(), width), dtype)  # [T * K, D]
        # A single token has few rows: copying their bytes costs less than one operation of torch.
        self._bytes = data_of(self._outputs) if groups.num_tokens == 1 else None
        if len(groups.unassigned):
            self._clear(groups.unassigned)

    def add(self, rows: WorkerRows, answer: WorkerAnswer) -> None:
        header = answer.response.output
        if self._bytes is None:
            outputs = decode_rows(header, answer.output)
            self._outputs.index_copy_(0, _tensor_of(rows.assignments), outputs)
            return
        data = (
            answer.data if header.dtype not in SCALED_DTYPES else data_of(decode_rows(header, answer.output))
        )
        row_bytes = len(self._bytes) // len(self._outputs)
        for i, assignment in enumerate(rows.assignments):
            to, start = assignment * row_bytes, i * row_bytes
            self._bytes[to : to + row_bytes] = data[start : start + row_bytes]

    def clear(self, rows: WorkerRows) -> None:
        self._clear(rows.assignments)

    def outputs_of(self, rows: WorkerRows) -> Tensor:
        return self._outputs.index_select(0, _tensor_of(rows.assignments))

    def result(self) -> Tensor:
        return combine(self._staging.to_device(self._outputs).view(*self._weights.shape, -1), self._weights)

    def looks_finite(self, result: Tensor) -> bool:
        return _is_sum_finite(result if result.device.type == "cpu" else self._outputs)

    def _clear(self, assignments: Indices | list[int]) -> None:
        # Uninitialised memory must not reach other tokens: attention multiplies it by zero, but NaN stays.
        self._outputs.index_fill_(0, _tensor_of(assignments), 0)


class SumCombiner:
    """COMBINE_SUM: one row per token that a worker was sent, the weighted sum over that worker's experts. The
    sums are added in the order of the calls, so placement affects the last bits."""

    mixes_experts = True

    def __init__(self, staging: Staging, hidden: Tensor) -> None:
        """`hidden` [T, D] is the layer's input."""
        self._staging = staging
        self._shape, self._device = hidden.shape, hidden.device
        # By the first of a worker's groups, which no two workers share: the sums [R, D] in float32.
        self._sums: dict[int, tuple[WorkerRows, Tensor]] = {}

    def add(self, rows: WorkerRows, answer: WorkerAnswer) -> None:
        outputs = decode_rows(answer.response.output, answer.output)
        sums = self._staging.empty((len(outputs), outputs.shape[1]), torch.float32).copy_(outputs)
        self._sums[rows.groups[0]] = rows, sums

    def clear(self, rows: WorkerRows) -> None:
        self._sums.pop(rows.groups[0], None)

    def outputs_of(self, rows: WorkerRows) -> Tensor:
        return self._sums[rows.groups[0]][1]

    def result(self) -> Tensor:
        total = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        for rows, sums in self._sums.values():
            on_device = self._staging.to_device(sums)
            if rows.tokens is None:
                total += on_device
            else:
                total.index_add_(0, torch.from_numpy(rows.tokens).to(self._device), on_device)
        return total

    def looks_finite(self, result: Tensor) -> bool:
        if result.device.type == "cpu":
            return _is_sum_finite(result)
        return all(_is_sum_finite(sums) for _, sums in self._sums.values())


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Adds up rows [T, K, D] with weights [T, K] float32, rank by rank: [T, D] float32."""
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
