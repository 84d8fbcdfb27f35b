"""What the workers of a layer are asked, and which answers are valid.

Shapes: T tokens, K experts per token, D hidden size, R tokens of one worker.
"""

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
from router.dispatch.row_grouping import WorkerRows
from router.workers.transports.base import WorkerAnswer


class LayerRequest:
    """One layer of a micro-batch in host memory, from which the request to each worker is made."""

    def __init__(
        self,
        epoch: str,
        layer: int,
        hidden: Tensor,
        scales: Tensor | None,
        weights: npt.NDArray[np.float32] | None,
    ) -> None:
        """`hidden` [T, D] is in a dtype of the wire, with scales [T] if the dtype has scales; weights [T * K]
        ask for weighted sums."""
        self.layer = layer
        self._epoch = epoch
        self._hidden = hidden
        self._scales = scales
        self._weights = weights
        self._dtypes = (WIRE_DTYPES[hidden.dtype],)
        # The fields that are the same for all workers: copying a message costs less than setting them again.
        self._common = expert_pb2.ComputeRequest(
            epoch=epoch,
            layer=layer,
            hidden=header_of(hidden, scales),
            combine=expert_pb2.COMBINE_ROWS if weights is None else expert_pb2.COMBINE_SUM,
        )

    def in_epoch(self, epoch: str) -> LayerRequest:
        """The same rows, asked of the experts of another epoch, row by row."""
        return LayerRequest(epoch, self.layer, self._hidden, self._scales, None)

    def to_worker(
        self, rows: WorkerRows, versions: Sequence[bytes], timeout_ms: int
    ) -> tuple[expert_pb2.ComputeRequest, Tensor]:
        """The request for the rows of one worker, with a version for each of its slots, and the hidden states
        [R, D] that are sent with it."""
        request, hidden = expert_pb2.ComputeRequest(), self._hidden
        request.CopyFrom(self._common)
        request.timeout_ms = timeout_ms
        if rows.tokens is not None:
            tokens = torch.from_numpy(rows.tokens)
            hidden = hidden.index_select(0, tokens)
            scales = None if self._scales is None else self._scales.index_select(0, tokens)
            request.hidden.CopyFrom(header_of(hidden, scales))
        weights = None if self._weights is None else self._weights[rows.assignments].tolist()
        end = 0
        for slot, version, count in zip(rows.slots, versions, rows.counts, strict=True):
            start, end = end, end + count
            expert = request.experts.add(slot=slot, version=version, rows=rows.hidden_rows[start:end])
            if weights is not None:
                expert.weights.extend(weights[start:end])
        return request, hidden

    def check(self, answer: WorkerAnswer, rows: WorkerRows, versions: Sequence[bytes]) -> None:
        """Raises DataLoss unless the answer is for exactly this request: epoch, versions, dtype, shape, bytes
        and scales."""
        response = answer.response
        if response.epoch != self._epoch or response.versions != versions:
            raise DataLoss("the worker computed with another version", reason="WRONG_VERSION")
        num_rows = len(rows.assignments) if self._weights is None else rows.num_tokens
        try:
            check_tensor(
                response.output,
                field="output",
                dtypes=self._dtypes,
                shape=(num_rows, self._hidden.shape[1]),
                num_bytes=answer.data.nbytes,
            )
        except InvalidArgument as error:
            raise DataLoss(f"the worker's answer is malformed: {error.message}") from error
