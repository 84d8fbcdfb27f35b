"""What a failed call of the client means: the router's own error, or a sentence in place of gRPC's text."""

from __future__ import annotations

import grpc
from grpc_status import rpc_status

from moesaic.client.attempts import NO_ROUTER, ROUTER_UNREACHABLE
from moesaic.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MoesaicError,
    Unavailable,
    from_rpc_error,
)

# Parts of gRPC's text, which alone tells these cases from others. Without them the general sentence is used.
_MARK_OF_HTTP = "Expected SETTINGS frame"
_MARK_OF_SIZE = "Sent message larger than max"


def explain(error: grpc.RpcError, target: str, *, timeout_s: float, begun: bool = False) -> MoesaicError:
    """The error to raise for a call to `target`. `begun`: whether a part of the answer has arrived."""
    failure = from_rpc_error(error)
    if rpc_status.from_call(error) is not None:
        return failure
    text = error.details() or ""
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"no {'complete ' if begun else ''}answer within {timeout_s:g} s")
        case grpc.StatusCode.UNAVAILABLE if begun:
            return Unavailable(
                f"the connection to the router at {target} broke in mid-answer", reason=ROUTER_UNREACHABLE
            )
        case grpc.StatusCode.UNAVAILABLE if _MARK_OF_HTTP in text:
            return FailedPrecondition(
                f"{target} is an HTTP port: the client speaks gRPC, on the port that `moesaic serve` prints"
                " after grpc= (50051 unless set otherwise)",
                reason="NOT_A_ROUTER",
            )
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(f"no router answers at {target}", reason=NO_ROUTER)
        case grpc.StatusCode.CANCELLED:
            return Cancelled("the client was closed during the call")
        case grpc.StatusCode.UNIMPLEMENTED:
            return FailedPrecondition(
                f"{target} is another gRPC service, not a router", reason="NOT_A_ROUTER"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED if _MARK_OF_SIZE in text:
            return InvalidArgument("the request is too large for one message", reason="TOO_LARGE")
    return failure
