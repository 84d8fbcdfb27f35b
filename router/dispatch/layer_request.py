"""What the workers of a layer are asked, and what they may answer: alike for all of them but for their parts."""

# Shapes: T tokens, K experts per token, D hidden size, R tokens of one worker.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.errors import DataLoss, InvalidArgument
from moesaic.v1 import expert_pb2
from moesaic.wire.tensor_check import check_tensor
from moesaic.wire.tensors import WIRE_DTYPES, header_of
from router.dispatch.row_grouping import Part
from router.workers.transports.base import WorkerAnswer


class LayerMessage:
    """Made once for a layer of a micro-batch, in host memory."""

    def __init__(
        self,
        epoch: str,
        layer: int,
        rows: Tensor,
        scales: Tensor | None,
        weights: npt.NDArray[np.float32] | None,
    ) -> None:
        """rows [T, D] in a dtype of the wire, with scales [T] where it has some; weights [T * K] ask for sums."""
        self._epoch = epoch
        self._rows = rows
        self._scales = scales
        self._weights = weights
        self._dtypes = (WIRE_DTYPES[rows.dtype],)
        # Copying what is the same for all costs less than to say it again.
        self._common = expert_pb2.ComputeRequest(
            epoch=epoch,
            layer=layer,
            hidden=header_of(rows, scales),
            combine=expert_pb2.COMBINE_ROWS if weights is None else expert_pb2.COMBINE_SUM,
        )

    def to_worker(
        self, part: Part, versions: Sequence[bytes], timeout_ms: int
    ) -> tuple[expert_pb2.ComputeRequest, Tensor]:
        """The request for one part, in these versions of its slots, and the rows [R, D] that go with it."""
        request, rows = expert_pb2.ComputeRequest(), self._rows
        request.CopyFrom(self._common)
        request.timeout_ms = timeout_ms
        if part.tokens is not None:
            tokens = torch.from_numpy(part.tokens)
            rows = rows.index_select(0, tokens)
            scales = None if self._scales is None else self._scales.index_select(0, tokens)
            request.hidden.CopyFrom(header_of(rows, scales))
        weights = None if self._weights is None else self._weights[part.assignments].tolist()
        end = 0
        for slot, version, count in zip(part.slots, versions, part.counts, strict=True):
            start, end = end, end + count
            expert = request.experts.add(slot=slot, version=version, rows=part.rows[start:end])
            if weights is not None:
                expert.weights.extend(weights[start:end])
        return request, rows

    def check(self, answer: WorkerAnswer, part: Part, versions: Sequence[bytes]) -> None:
        """Raises DataLoss unless it answers just what was asked: epoch, versions, dtype, shape, bytes and scales."""
        response = answer.response
        if response.epoch != self._epoch or response.versions != versions:
            raise DataLoss("the worker computed with another version", reason="WRONG_VERSION")
        num_rows = len(part.assignments) if self._weights is None else part.num_tokens
        try:
            check_tensor(
                response.output,
                field="output",
                dtypes=self._dtypes,
                shape=(num_rows, self._rows.shape[1]),
                num_bytes=answer.data.nbytes,
            )
        except InvalidArgument as error:
            raise DataLoss(f"the worker's answer is malformed: {error.message}") from error
