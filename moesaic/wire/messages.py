"""Messages of the data plane as bytes: a protobuf message, and apart from it the bytes of its one tensor.

The result is plain protobuf for any other implementation. This one writes the tensor's bytes first, as a
separate occurrence of the field that holds them (protobuf merges occurrences), with lengths of fixed width.
The bytes are thus copied once, start at a known, aligned offset, and are read as a view. Messages from other
writers are read by protobuf alone.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from moesaic.errors import DataLoss, InvalidArgument
from moesaic.v1 import common_pb2, expert_pb2

Message = TypeVar("Message", expert_pb2.ComputeRequest, expert_pb2.ComputeResponse)

# The method whose requests and responses these messages are.
COMPUTE_METHOD = "/moesaic.v1.ExpertService/Compute"

_LENGTH_DELIMITED = 2
_HIDDEN = expert_pb2.ComputeRequest.HIDDEN_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_OUTPUT = expert_pb2.ComputeResponse.OUTPUT_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_DATA = common_pb2.Tensor.DATA_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
# A varint may be longer than necessary. Five bytes hold any length, so two tags with their lengths put the
# data at offset 12.
_LENGTH_BYTES = 5
_DATA_OFFSET = 2 * (1 + _LENGTH_BYTES)


class Framed(NamedTuple, Generic[Message]):
    """A message whose tensor has no bytes (`hidden.data` or `output.data` is empty), and these bytes."""

    message: Message
    data: memoryview


def encode_request(framed: Framed[expert_pb2.ComputeRequest]) -> bytes:
    """The bytes of a ComputeRequest with its `hidden.data`."""
    return _encode(_HIDDEN, framed.message.SerializeToString(), framed.data)


def encode_response(framed: Framed[expert_pb2.ComputeResponse]) -> bytes:
    """The bytes of a ComputeResponse with its `output.data`."""
    return _encode(_OUTPUT, framed.message.SerializeToString(), framed.data)


def decode_request(raw: bytes) -> Framed[expert_pb2.ComputeRequest]:
    """Raises InvalidArgument if `raw` is not a ComputeRequest."""
    try:
        return _decode(expert_pb2.ComputeRequest, _HIDDEN, raw)
    except DecodeError as error:
        raise InvalidArgument("the call is not a ComputeRequest") from error


def decode_response(raw: bytes) -> Framed[expert_pb2.ComputeResponse]:
    """Raises DataLoss if `raw` is not a ComputeResponse."""
    try:
        return _decode(expert_pb2.ComputeResponse, _OUTPUT, raw)
    except DecodeError as error:
        raise DataLoss("the answer is not a ComputeResponse") from error


def _encode(field: int, head: bytes, data: memoryview) -> bytes:
    return b"".join((_prefix(field, data.nbytes), data, head)) if data.nbytes else head


def _decode(kind: type[Message], field: int, raw: bytes) -> Framed[Message]:
    end = _data_end(field, raw)
    if end:
        head = raw[end:]
        message = kind.FromString(head)
        tensor = _tensor(message)
        # Only then nothing behind the data changes it: protobuf merges every later occurrence of the tensor.
        if not tensor.data and message.SerializeToString() == head:
            tensor.SetInParent()
            return Framed(message, memoryview(raw)[_DATA_OFFSET:end])
    message = kind.FromString(raw)
    data = _tensor(message).data
    if data:
        _tensor(message).ClearField("data")
    return Framed(message, memoryview(data))


def _data_end(field: int, raw: bytes) -> int:
    """The offset at which the data ends in a message that `_encode` wrote; 0 for any other message."""
    if len(raw) <= _DATA_OFFSET or raw[0] != field:
        return 0
    num_bytes = _read_length(raw[_DATA_OFFSET - _LENGTH_BYTES : _DATA_OFFSET])
    end = _DATA_OFFSET + num_bytes
    return end if num_bytes > 0 and end <= len(raw) and raw.startswith(_prefix(field, num_bytes)) else 0


def _prefix(field: int, num_bytes: int) -> bytes:
    """The tag and length of the tensor, then the tag and length of its data."""
    inner = 1 + _LENGTH_BYTES + num_bytes
    return bytes((field, *_length(inner), _DATA, *_length(num_bytes)))


def _length(value: int) -> tuple[int, int, int, int, int]:
    """A varint of `_LENGTH_BYTES` bytes."""
    return (
        value & 127 | 128,
        value >> 7 & 127 | 128,
        value >> 14 & 127 | 128,
        value >> 21 & 127 | 128,
        value >> 28,
    )


def _read_length(raw: bytes) -> int:
    return raw[0] & 127 | (raw[1] & 127) << 7 | (raw[2] & 127) << 14 | (raw[3] & 127) << 21 | raw[4] << 28


def _tensor(message: expert_pb2.ComputeRequest | expert_pb2.ComputeResponse) -> common_pb2.Tensor:
    return message.hidden if isinstance(message, expert_pb2.ComputeRequest) else message.output
