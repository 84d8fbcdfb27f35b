"""One call: what a caller asks of this worker for one layer, checked against what the worker holds.

Everything that a message can have wrong is found here, before any computing, except NaN in the rows: reading all of
them is work for the compute thread.
"""

# Shapes: D hidden size, R rows of `hidden`, n rows of one expert.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_worker.expert import Expert
from expert_worker.expert_store import ExpertStore
from moesaic.codec import check_tensor
from moesaic.errors import DeadlineExceeded, InvalidArgument
from moesaic.families import MoeModel
from moesaic.manifest import ExpertAddress
from moesaic.tensors import TORCH_DTYPES, from_wire
from moesaic.v1 import expert_pb2

ROW_DTYPES = tuple(TORCH_DTYPES)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """The rows of one call that one expert computes."""

    expert: Expert
    rows: Tensor  # [n] int64: ascending indices into `hidden`
    weights: Tensor | None  # [n] float32, for a weighted sum


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One layer's work for one batch of one caller. With `combine_sum` one row per row of `hidden` comes back,
    else one per (row, expert), expert by expert."""

    layer: int
    hidden: Tensor  # [R, D], read-only
    groups: tuple[ExpertRows, ...]
    combine_sum: bool
    deadline_s: float

    @property
    def num_rows(self) -> int:
        """(row, expert) pairs to compute."""
        return sum(len(group.rows) for group in self.groups)


def read_call(
    request: expert_pb2.ComputeRequest, *, model: MoeModel, store: ExpertStore, max_rows: int, now_s: float
) -> Call:
    """Checks a request and resolves its experts.

    Raises InvalidArgument for a wrong message, FailedPrecondition for an expert or version that is not held,
    DeadlineExceeded when the caller does not wait any more.
    """
    if request.timeout_ms == 0:
        raise DeadlineExceeded("the caller's time was over on arrival")
    if request.layer >= model.num_layers:
        raise InvalidArgument(f"layer must be below {model.num_layers}", field="layer")
    if request.combine not in (expert_pb2.COMBINE_ROWS, expert_pb2.COMBINE_SUM):
        raise InvalidArgument("combine must be COMBINE_ROWS or COMBINE_SUM", field="combine")
    check_tensor(request.hidden, field="hidden", dtypes=ROW_DTYPES, shape=(None, model.hidden_size))
    num_rows = request.hidden.shape[0]
    if not 1 <= num_rows <= max_rows:
        raise InvalidArgument(f"hidden must have 1 to {max_rows} rows", field="hidden.shape")
    _check_slots(request.experts)
    combine_sum = request.combine == expert_pb2.COMBINE_SUM
    groups = tuple(
        _read_group(group, f"experts[{i}]", request.layer, num_rows, combine_sum, store)
        for i, group in enumerate(request.experts)
    )
    deadline_s = now_s + request.timeout_ms / 1000
    return Call(request.layer, from_wire(request.hidden), groups, combine_sum, deadline_s)


def _check_slots(experts: Sequence[expert_pb2.ExpertRows]) -> None:
    if not experts:
        raise InvalidArgument("experts must not be empty", field="experts")
    if len({group.slot for group in experts}) < len(experts):
        raise InvalidArgument("experts must name each slot once", field="experts")


def _read_group(
    group: expert_pb2.ExpertRows, field: str, layer: int, num_rows: int, combine_sum: bool, store: ExpertStore
) -> ExpertRows:
    expert = store.get(ExpertAddress(layer, group.slot), group.version, field=f"{field}.version")
    rows = np.fromiter(group.rows, np.int64, len(group.rows))
    _check_rows(rows, num_rows, f"{field}.rows")
    if len(group.weights) != (len(rows) if combine_sum else 0):
        raise InvalidArgument(
            f"{field}.weights must hold one weight per row with COMBINE_SUM, else none",
            field=f"{field}.weights",
        )
    weights = _read_weights(group, f"{field}.weights") if combine_sum else None
    return ExpertRows(expert, torch.from_numpy(rows), weights)


def _read_weights(group: expert_pb2.ExpertRows, field: str) -> Tensor:
    weights = np.fromiter(group.weights, np.float32, len(group.weights))
    if not np.isfinite(weights).all():
        raise InvalidArgument(f"{field} must be finite", field=field)
    return torch.from_numpy(weights)


def _check_rows(rows: npt.NDArray[np.int64], num_rows: int, field: str) -> None:
    if not len(rows):
        raise InvalidArgument(f"{field} must not be empty", field=field)
    if rows[-1] >= num_rows or (rows[1:] <= rows[:-1]).any():
        raise InvalidArgument(f"{field} must be ascending indices below {num_rows}", field=field)
