"""Errors as HTTP responses: a status, OpenAI's envelope, and whether a retry can help.

One table maps the classes of moesaic.errors, another one the refusals of HTTP itself (path, method, size,
media type). A message was written for the caller by the router or the gateway; it never holds a path, an
address or a stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gateway.openai.requests import COMBINATION, UNION_BRANCHES
from gateway.openai.strict_json import readable
from moesaic import errors
from moesaic.errors import InvalidArgument, MoesaicError

# 499 appears in the log only: the client has disconnected.
CLIENT_GONE = 499

_STATUS: dict[type[MoesaicError], int] = {
    errors.InvalidArgument: 400,
    # 400 rather than 501, because openai-python retries every 5xx.
    errors.Unsupported: 400,
    errors.NotFound: 404,
    errors.Aborted: 409,
    errors.Overloaded: 429,
    errors.Cancelled: CLIENT_GONE,
    # The failed precondition is the server's own, unless the request stated it.
    errors.FailedPrecondition: 500,
    errors.InternalError: 500,
    errors.Unavailable: 503,
    errors.DataLoss: 503,
    errors.DeadlineExceeded: 504,
}
# The fields in which a request states a precondition: experts that its epoch must have, the epoch itself.
_PRECONDITIONS = frozenset({"experts", "epoch"})
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
}
# A retry can succeed: the queue may have room, or a replica may be back. For any other status it would fail
# again.
_RETRYABLE = frozenset({429, 503})
_DEFAULT_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class HttpError:
    """An error in the terms of the HTTP API."""

    status: int
    message: str
    param: str | None
    code: str
    retry_after_s: float | None = None

    @property
    def envelope(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {"message": self.message, "type": self._type, "param": self.param, "code": self.code}
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.status not in _RETRYABLE:
            return {"x-should-retry": "false"}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s or _DEFAULT_RETRY_S)))}

    @property
    def _type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def from_moesaic(error: MoesaicError) -> HttpError:
    """The error with the nearest status; `code` is its reason."""
    status = next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), 500)
    if error.reason == errors.TOO_LARGE:
        status = 413
    elif isinstance(error, errors.FailedPrecondition) and (error.field or "").split(".")[0] in _PRECONDITIONS:
        status = 400
    return HttpError(status, error.message, error.field, error.reason.lower(), error.retry_after_s)


def about_field(error: MoesaicError, name: str) -> MoesaicError:
    """The same error about the field `name`: the HTTP API's name for the router's `error.field`."""
    prefix = f"{error.field}:"
    message = error.message
    if message.startswith(prefix):
        message = f"{name}:{message.removeprefix(prefix)}"
    return type(error)(message, field=name, reason=error.reason, retry_after_s=error.retry_after_s)


def from_http(error: HTTPException) -> HttpError:
    """A refusal of the framework, made before a route is reached."""
    return HttpError(
        error.status_code, str(error.detail), None, _HTTP_CODES.get(error.status_code, "invalid_request")
    )


def from_validation(error: RequestValidationError) -> HttpError:
    """An error about the first field that does not fit the request's type."""
    first = error.errors()[0]
    param = first["ctx"]["param"] if first["type"] == COMBINATION else _param(first["loc"])
    return from_moesaic(InvalidArgument(_complaint(first, param), field=param))


def response(error: HttpError, extra_headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.envelope, error.status, headers={**(extra_headers or {}), **error.headers})


def _param(loc: tuple[str | int, ...]) -> str | None:
    """The path of a field, such as `messages[0].content`, without the tags of union branches."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in UNION_BRANCHES:
            path += f".{readable(part)}" if path else readable(part)
    return path or None


def _complaint(error: dict[str, Any], param: str | None) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown field {param}"
    if error["type"] == "missing":
        return f"missing field {param}" if param else "the body is empty"
    if error["type"] == COMBINATION:
        return str(error["msg"])
    return f"{param or 'the body'}: {error['msg'].removeprefix('Value error, ')}"
