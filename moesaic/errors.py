"""One tree of exceptions, and its mapping to and from gRPC status.

MoesaicError
├── InvalidArgument      the request is wrong; `field` names the field at fault
├── NotFound             no such model, expert or epoch
├── Unsupported          a valid request for something that is not served
├── FailedPrecondition   the peer does not hold that epoch, version or file
│   └── CheckpointError  a model folder cannot be served
├── Overloaded           a queue is full: try again after `retry_after_s`
├── Aborted              a concurrent change was applied first
├── Unavailable          the server is starting or draining, or no replica is left
├── DeadlineExceeded     the caller's deadline has passed
├── Cancelled            the caller cancelled the call or disconnected
├── DataLoss             a reply failed its checks
└── InternalError        a bug in Moesaic; the message gives no details

Every error travels as google.rpc.Status with an ErrorInfo (reason, domain, metadata.field) and, where waiting
helps, a RetryInfo. Messages name the field and the limit, never the value, a path or a stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "moesaic"
# The reason of an InvalidArgument whose request or answer no message can hold, so that a retry cannot help.
TOO_LARGE = "TOO_LARGE"


class MoesaicError(Exception):
    """The base class of all errors that Moesaic raises deliberately."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        message = _tellable(message)
        super().__init__(message)
        self.message = message
        self.field = None if field is None else _tellable(field)
        self.reason = reason or self.default_reason
        self.retry_after_s = retry_after_s


class InvalidArgument(MoesaicError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"


class NotFound(MoesaicError):
    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class Unsupported(MoesaicError):
    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNSUPPORTED"


class FailedPrecondition(MoesaicError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class CheckpointError(FailedPrecondition):
    default_reason = "BAD_CHECKPOINT"


class Overloaded(MoesaicError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "OVERLOADED"


class Aborted(MoesaicError):
    code = grpc.StatusCode.ABORTED
    default_reason = "ABORTED"


class Unavailable(MoesaicError):
    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(MoesaicError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(MoesaicError):
    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class DataLoss(MoesaicError):
    code = grpc.StatusCode.DATA_LOSS
    default_reason = "DATA_LOSS"


class InternalError(MoesaicError):
    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


_BY_CODE: dict[grpc.StatusCode, type[MoesaicError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        Unsupported,
        FailedPrecondition,
        Overloaded,
        Aborted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        DataLoss,
        InternalError,
    )
}
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def _tellable(text: str) -> str:
    """What UTF-8 can carry: a message may repeat a name of JSON's, which may hold half of a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def to_status(error: MoesaicError) -> status_pb2.Status:
    """The error as google.rpc.Status with packed details."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.field is not None:
        info.metadata["field"] = error.field
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    _pack(status, info)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_status(status: status_pb2.Status) -> MoesaicError:
    """The inverse of `to_status`. A foreign or unknown status becomes the nearest class of the tree."""
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    cls = _BY_CODE.get(code, MoesaicError)
    reason, field, retry_after_s = None, None, None
    for detail in _unpack(status.details):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason, field = detail.reason, detail.metadata.get("field")
        else:
            retry_after_s = detail.retry_delay.ToNanoseconds() / 1e9
    return cls(status.message or code.name.lower(), field=field, reason=reason, retry_after_s=retry_after_s)


def from_rpc_error(error: grpc.RpcError) -> MoesaicError:
    """The error of a failed call, with its rich details where the server sent some."""
    status = rpc_status.from_call(error)
    if status is not None:
        return from_status(status)
    code, details = error.code(), error.details()
    return _BY_CODE.get(code, MoesaicError)(details or code.name.lower())


def _pack(
    status: status_pb2.Status, detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo
) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _unpack(
    details: Iterable[any_pb2.Any],
) -> Iterator[error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo]:
    for detail in details:
        for message in (error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()):
            try:
                if detail.Unpack(message):
                    yield message
            except DecodeError:  # a malformed detail from a foreign peer; code and message are still valid
                continue
