"""The HTTP/2 headers of gRPC: those that open a call, that accept it, and that hold its status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from urllib.parse import quote, unquote

import grpc
from h2.errors import ErrorCodes

Header = tuple[bytes, bytes]

CANCELLED: int = grpc.StatusCode.CANCELLED.value[0]
UNKNOWN: int = grpc.StatusCode.UNKNOWN.value[0]
PERMISSION_DENIED: int = grpc.StatusCode.PERMISSION_DENIED.value[0]
RESOURCE_EXHAUSTED: int = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
UNIMPLEMENTED: int = grpc.StatusCode.UNIMPLEMENTED.value[0]
INTERNAL: int = grpc.StatusCode.INTERNAL.value[0]
UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]
UNAUTHENTICATED: int = grpc.StatusCode.UNAUTHENTICATED.value[0]

CALL_ACCEPTED: tuple[Header, ...] = ((b":status", b"200"), (b"content-type", b"application/grpc"))
NOT_GRPC: tuple[Header, ...] = ((b":status", b"415"),)

_CODES: Mapping[bytes, int] = {b"%d" % code.value[0]: code.value[0] for code in grpc.StatusCode}
# Escaping every byte makes them three times as long, and other implementations bound their header lists, at 8
# KiB or more.
_MAX_DETAILS_BYTES = 2_000
# All printable characters except the escape itself and the space, with which a header may not begin or end.
_PLAIN = "".join(map(chr, range(0x21, 0x7F))).replace("%", "")

# The tables of gRPC's HTTP/2 specification: the status that a reset, or an HTTP status, stands for.
_OF_RESET: Mapping[int, int] = {
    ErrorCodes.REFUSED_STREAM: UNAVAILABLE,
    ErrorCodes.CANCEL: CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: PERMISSION_DENIED,
}
_OF_HTTP_STATUS: Mapping[bytes, int] = {
    b"%d" % status: code
    for status, code in {
        HTTPStatus.BAD_REQUEST: INTERNAL,
        HTTPStatus.UNAUTHORIZED: UNAUTHENTICATED,
        HTTPStatus.FORBIDDEN: PERMISSION_DENIED,
        HTTPStatus.NOT_FOUND: UNIMPLEMENTED,
        HTTPStatus.TOO_MANY_REQUESTS: UNAVAILABLE,
        HTTPStatus.BAD_GATEWAY: UNAVAILABLE,
        HTTPStatus.SERVICE_UNAVAILABLE: UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT: UNAVAILABLE,
    }.items()
}


def call(method: str, authority: str) -> tuple[Header, ...]:
    return (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.encode()),
        (b":authority", authority.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"moesaic"),
    )


def status(code: int, details: str) -> tuple[Header, ...]:
    """The trailers."""
    headers = ((b"grpc-status", b"%d" % code),)
    if not details:
        return headers
    return (
        *headers,
        (b"grpc-message", quote(details.encode(errors="replace")[:_MAX_DETAILS_BYTES], _PLAIN).encode()),
    )


def is_call(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request is a gRPC call."""
    return headers[b":method"] == b"POST" and _is_grpc(headers)


def read_status(headers: Iterable[Header]) -> tuple[int, str]:
    """Code and details from the last headers of an answer, which may be its only ones."""
    fields = dict(headers)
    code = fields.get(b"grpc-status")
    if code is None:
        return read_refusal(headers) or (UNKNOWN, "the call ended without a status")
    return _CODES.get(code, UNKNOWN), unquote(fields.get(b"grpc-message", b"").decode("ascii", "replace"))


def read_refusal(headers: Iterable[Header]) -> tuple[int, str] | None:
    """Code and details if the answer is not a gRPC answer, else None."""
    fields = dict(headers)
    # Trailers have no HTTP status; that of the answer was in its first headers.
    http_status = fields.get(b":status")
    if http_status is None:
        return None
    if http_status != b"200":
        code = _OF_HTTP_STATUS.get(http_status, UNKNOWN)
        return code, f"the answer has the HTTP status {http_status.decode('ascii', 'replace')}"
    return None if _is_grpc(fields) else (UNKNOWN, "the answer is not of gRPC's content type")


def _is_grpc(headers: Mapping[bytes, bytes]) -> bool:
    return headers.get(b"content-type", b"").startswith(b"application/grpc")


def reset_status(error_code: int) -> tuple[int, str]:
    """Code and details for RST_STREAM."""
    return _OF_RESET.get(error_code, INTERNAL), f"the other end reset the call: {error_name(error_code)}"


def error_name(error_code: int | None) -> str:
    return error_code.name if isinstance(error_code, ErrorCodes) else str(error_code)
