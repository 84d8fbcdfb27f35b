"""One call: the work that a caller asks for in one layer, checked against what the worker holds.

Every error of a message is found here, before anything is computed, except NaN in the rows: reading all of
them is left to the compute thread.

Shapes: D hidden size, R rows of `hidden`, N (row, expert) pairs to compute.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_worker.experts.expert import Expert
from expert_worker.experts.store import ExpertStore
from moesaic.epoch import ExpertAddress
from moesaic.errors import DeadlineExceeded, InvalidArgument
from moesaic.families import MoeModel
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed
from moesaic.wire.tensor_check import check_tensor
from moesaic.wire.tensors import TORCH_DTYPES, decode_rows, view_rows

ROW_DTYPES = tuple(TORCH_DTYPES)


class ExpertCall(NamedTuple):
    """The work of one layer for one batch of one caller.

    With weights the answer has one row per row of `hidden`, the weighted sum of its experts. Without, it has
    one row per (row, expert) pair, expert by expert.
    """

    layer: int
    hidden: Tensor  # [R, D], must not be written to
    experts: Sequence[Expert]
    # The number of rows of each expert, at least one.
    counts: Sequence[int]
    # Indices into `hidden`, expert by expert, ascending for each.
    rows: Tensor  # [N] int64
    weights: Tensor | None  # [N] float32
    deadline_s: float

    @property
    def combine_sum(self) -> bool:
        return self.weights is not None

    @property
    def num_rows(self) -> int:
        """The number of (row, expert) pairs to compute."""
        return sum(self.counts)


def read_call(
    framed: Framed[expert_pb2.ComputeRequest],
    *,
    model: MoeModel,
    store: ExpertStore,
    max_rows: int,
    now_s: float,
) -> ExpertCall:
    """Checks a request and resolves its experts. The time that the caller waits runs from `now_s`.

    Raises InvalidArgument for a wrong message, FailedPrecondition for an expert or version that is not held,
    DeadlineExceeded when the caller does not wait any more.
    """
    request = framed.message
    layer, hidden, combine = request.layer, request.hidden, request.combine
    if request.timeout_ms == 0:
        raise DeadlineExceeded("the caller's time was over on arrival")
    if layer not in model.experts:
        raise InvalidArgument(f"layer {layer} has no experts", field="layer")
    if combine not in (expert_pb2.COMBINE_ROWS, expert_pb2.COMBINE_SUM):
        raise InvalidArgument("combine must be COMBINE_ROWS or COMBINE_SUM", field="combine")
    check_tensor(
        hidden,
        field="hidden",
        dtypes=ROW_DTYPES,
        shape=(None, model.hidden_size),
        num_bytes=framed.data.nbytes,
    )
    num_rows = hidden.shape[0]
    if not 1 <= num_rows <= max_rows:
        raise InvalidArgument(f"hidden must have 1 to {max_rows} rows", field="hidden.shape")
    experts, rows, weights, ends = _read_experts(
        request.experts, layer, num_rows, combine == expert_pb2.COMBINE_SUM, store
    )
    return ExpertCall(
        layer,
        decode_rows(hidden, view_rows(hidden, framed.data)),
        experts,
        [end - start for start, end in pairwise(ends)],
        torch.from_numpy(rows),
        None if weights is None else torch.from_numpy(weights),
        now_s + request.timeout_ms / 1000,
    )


def _read_experts(
    groups: Sequence[expert_pb2.ExpertRows], layer: int, num_rows: int, combine_sum: bool, store: ExpertStore
) -> tuple[list[Expert], npt.NDArray[np.int64], npt.NDArray[np.float32] | None, list[int]]:
    """The experts, their rows and weights joined, and the bounds of each expert's rows, beginning with 0.

    The rows are checked for all experts at once, because the cost of numpy is by the call, not by the row.
    """
    versions, experts = set[tuple[int, bytes]](), []
    rows, weights, ends = [], [], [0]
    for i, group in enumerate(groups):
        slot, version = group.slot, group.version
        if (slot, version) in versions:
            raise InvalidArgument("experts must name each version of a slot once", field="experts")
        versions.add((slot, version))
        experts.append(store.get(ExpertAddress(layer, slot), version, field=f"experts[{i}].version"))
        part = group.rows[:]
        rows.extend(part)
        ends.append(len(rows))
        weights.extend(group.weights[:])
        if len(weights) != (len(rows) if combine_sum else 0):
            _refuse(i, "weights", "hold one weight per row with COMBINE_SUM, else none")
        if not part or part[-1] >= num_rows:
            _refuse_rows(i, num_rows)
    if not experts:
        raise InvalidArgument("experts must not be empty", field="experts")
    joined = np.array(rows, np.int64)
    if len(rows) > len(experts):
        _check_ascending(joined, ends, num_rows)
    return experts, joined, _read_weights(weights, ends) if combine_sum else None, ends


def _check_ascending(joined: npt.NDArray[np.int64], ends: Sequence[int], num_rows: int) -> None:
    """Checks `joined`, the rows of all experts: those of expert i lie from ends[i] to ends[i + 1]."""
    rises = joined[1:] > joined[:-1]
    # The first row of an expert need not be above the last row of the expert before it.
    rises[np.array(ends[1:-1], np.intp) - 1] = True
    if not rises.all():
        _refuse_rows(bisect_right(ends, int(rises.argmin())) - 1, num_rows)


def _read_weights(weights: Sequence[float], ends: Sequence[int]) -> npt.NDArray[np.float32]:
    joined = np.array(weights, np.float32)
    finite = np.isfinite(joined)
    if not finite.all():
        _refuse(bisect_right(ends, int(finite.argmin())) - 1, "weights", "be finite")
    return joined


def _refuse_rows(i: int, num_rows: int) -> NoReturn:
    _refuse(i, "rows", f"hold one or more ascending indices below {num_rows}")


def _refuse(i: int, name: str, must: str) -> NoReturn:
    field = f"experts[{i}].{name}"
    raise InvalidArgument(f"{field} must {must}", field=field)
