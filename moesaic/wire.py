"""Messages of the data plane as bytes: the protobuf message and, beside it, the bytes of its one tensor.

Any protobuf implementation reads and writes the same bytes; what is saved here is copying: the tensor goes from its
memory into the message once, and comes out as a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from moesaic.v1 import expert_pb2

Message = TypeVar("Message", expert_pb2.ComputeRequest, expert_pb2.ComputeResponse)


@dataclass(frozen=True, slots=True, eq=False)
class Framed(Generic[Message]):
    """A message without its tensor's bytes (`hidden.data` or `output.data` is empty), and these bytes."""

    message: Message
    data: memoryview


def encode_request(framed: Framed[expert_pb2.ComputeRequest]) -> bytes:
    """The bytes of a ComputeRequest with its `hidden.data`."""
    message = expert_pb2.ComputeRequest()
    message.CopyFrom(framed.message)
    message.hidden.data = bytes(framed.data)
    return message.SerializeToString()


def decode_request(raw: bytes) -> Framed[expert_pb2.ComputeRequest]:
    """Raises InvalidArgument when `raw` is no such message."""
    message = expert_pb2.ComputeRequest.FromString(raw)
    data = message.hidden.data
    message.hidden.ClearField("data")
    return Framed(message, memoryview(data))


def encode_response(framed: Framed[expert_pb2.ComputeResponse]) -> bytes:
    """The bytes of a ComputeResponse with its `output.data`."""
    message = expert_pb2.ComputeResponse()
    message.CopyFrom(framed.message)
    if framed.data:
        message.output.data = bytes(framed.data)
    return message.SerializeToString()


def decode_response(raw: bytes) -> Framed[expert_pb2.ComputeResponse]:
    """Raises DataLoss when `raw` is no such message."""
    message = expert_pb2.ComputeResponse.FromString(raw)
    data = message.output.data
    message.output.ClearField("data")
    return Framed(message, memoryview(data))
