"""The ways to a worker: their names, and what a gRPC stream, a direct stream and a same-host lane have in common."""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, Protocol

from torch import Tensor

from moesaic.errors import DataLoss, from_status
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed
from moesaic.wire.tensor_check import DTYPE_BYTES
from moesaic.wire.tensors import view_rows

# gRPC by threads of its own; gRPC by the threads that compute; shared memory. Also what statistics call them.
Way = Literal["grpc", "direct", "lane"]
GRPC: Final = "grpc"
DIRECT: Final = "direct"
LANE: Final = "lane"


class Answer(NamedTuple):
    """What a worker answered. `data` holds the bytes of its rows, to be read only, unchecked beyond their number; they
    may be overwritten by the next call on this transport: whoever keeps them copies."""

    response: expert_pb2.ComputeResponse
    data: memoryview

    @property
    def output(self) -> Tensor:
        """The rows as they are, in the dtype of the wire."""
        return view_rows(self.response.output, self.data)

    @property
    def busy_us(self) -> int:
        """The worker's own work on the call, by its own account."""
        timing = self.response.timing
        return timing.decode_us + timing.queue_us + timing.compute_us + timing.encode_us


class Transport(Protocol):
    """Many calls in flight to one worker. One thread sends and receives; `num_in_flight`, `broken` and `close` are for
    any thread."""

    @property
    def broken(self) -> bool:
        """Once true, always true: every call in flight fails, and another transport has to be opened."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Calls sent and neither answered nor given up."""
        ...

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> None:
        """Sends a call, named by its `call_id`, without waiting. `hidden` holds the contiguous CPU rows whose dtype,
        shape and scales the request names; they must not change before the answer came. Never raises for the worker's
        sake: where a call cannot be sent, `receive` says so."""
        ...

    def receive(self, call_id: int, timeout_s: float) -> Answer:
        """Waits for an answer. Raises what the worker answered, DataLoss for a malformed answer, Unavailable when the
        transport broke, or TimeoutError after `timeout_s`: the late answer is dropped then."""
        ...

    def close(self) -> None:
        """Fails the calls in flight."""
        ...


def read_answer(framed: Framed[expert_pb2.ComputeResponse]) -> Answer:
    """Raises what the worker answered in place of rows, DataLoss for rows that are no tensor."""
    response, data = framed.message, framed.data
    if response.HasField("error"):
        raise from_status(response.error)
    output = response.output
    item_bytes = DTYPE_BYTES.get(output.dtype, 0)
    if not item_bytes or math.prod(output.shape) * item_bytes != data.nbytes:
        raise DataLoss("the worker's answer is malformed: its bytes are not those of its dtype and shape")
    return Answer(response, data)
