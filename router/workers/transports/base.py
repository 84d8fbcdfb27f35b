"""What the transports to a worker have in common: their kinds, their interface, and their answers."""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, Protocol

from torch import Tensor

from moesaic.errors import DataLoss, from_status
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed
from moesaic.wire.tensor_check import DTYPE_BYTES
from moesaic.wire.tensors import view_rows

# grpc: a grpcio stream, served by grpcio's own threads. direct: a gRPC stream that the engine's thread and
# the worker's compute thread read and write themselves. shared_memory: buffers that both processes map.
# Statistics use these names.
TransportKind = Literal["grpc", "direct", "shared_memory"]
GRPC: Final = "grpc"
DIRECT: Final = "direct"
SHARED_MEMORY: Final = "shared_memory"

# The reason of an Unavailable when the worker's host is silent: another transport to it would not do better.
HOST_SILENT: Final = "HOST_SILENT"


class WorkerAnswer(NamedTuple):
    """A worker's answer to one call. `data` holds the bytes of its rows: read-only, and checked for their
    number alone. The next call on the same transport may overwrite them, so a caller that keeps them copies
    them."""

    response: expert_pb2.ComputeResponse
    data: memoryview

    @property
    def output(self) -> Tensor:
        """The rows, uncopied, in the dtype of the wire."""
        return view_rows(self.response.output, self.data)

    @property
    def busy_us(self) -> int:
        """The time that the worker spent on the call, as it measured it."""
        timing = self.response.timing
        return timing.decode_us + timing.queue_us + timing.compute_us + timing.encode_us


class Transport(Protocol):
    """Carries many calls at once to one worker. One thread sends and receives; any thread may use
    `num_in_flight`, `broken` and `close`."""

    @property
    def broken(self) -> bool:
        """Never becomes false again: every call in flight fails, and another transport has to be opened."""
        ...

    @property
    def num_in_flight(self) -> int:
        """The number of calls that were sent and are neither answered nor given up."""
        ...

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> None:
        """Sends a call, identified by its `call_id`, without waiting. `hidden` holds the contiguous CPU rows
        whose dtype, shape and scales the request names; they must not change before the answer has arrived.
        Never raises because of the worker: `receive` raises for a call that could not be sent."""
        ...

    def receive(self, call_id: int, timeout_s: float) -> WorkerAnswer:
        """Waits for an answer. Raises the error that the worker answered with, DataLoss for a malformed
        answer, Unavailable when the transport broke, or TimeoutError after `timeout_s`; a late answer is then
        dropped."""
        ...

    def wait(self, call_id: int, timeout_s: float) -> bool:
        """Whether the outcome of a call is there within the time: `receive` then has it at once."""
        ...

    def abandon(self, call_id: int) -> None:
        """Gives up a call that nobody waits for any more; a late answer is dropped."""
        ...

    def close(self) -> None:
        """Fails the calls in flight."""
        ...


def check_call_id(call_id: int, newest: int) -> None:
    """Raises DataLoss for an answer to a call that was never made: an empty message is one. Ids ascend from 1."""
    if not 0 < call_id <= newest:
        raise DataLoss("the worker answered a call that was never made")


def read_answer(framed: Framed[expert_pb2.ComputeResponse]) -> WorkerAnswer:
    """Raises the error that the worker answered with, or DataLoss where the bytes do not match their dtype
    and shape."""
    response, data = framed.message, framed.data
    if response.HasField("error"):
        raise from_status(response.error)
    output = response.output
    item_bytes = DTYPE_BYTES.get(output.dtype, 0)
    if not item_bytes or math.prod(output.shape) * item_bytes != data.nbytes:
        raise DataLoss("the worker's answer is malformed: its bytes are not those of its dtype and shape")
    return WorkerAnswer(response, data)
