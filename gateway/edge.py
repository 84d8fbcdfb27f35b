"""The outermost layer of the gateway, which handles every request, whatever its outcome.

Each request gets a request id, a span that continues the caller's trace, and one log line. Requests with a
foreign Host (DNS rebinding), headers or a declared body over the limit, or beyond the number of active
requests are refused here, in OpenAI's envelope, before the framework handles them. Browsers that ask for another
site's page (CORS) are answered here, too.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.cors import Cors
from gateway.openai import errors
from gateway.openai.errors import CLIENT_GONE, HttpError
from moesaic import telemetry
from moesaic.errors import InternalError, InvalidArgument, Overloaded

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 8 << 10
# The most requests at once. A router queues far fewer, and each request may hold a body of the full size.
MAX_ACTIVE = 512
# Health probes are answered even when all other requests are refused.
_PROBES = frozenset({"/health", "/ready"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_TRACE_HEADERS = frozenset({"traceparent", "tracestate"})
_RECORD = "moesaic.record"


@dataclass(slots=True)
class Record:
    """The logged and traced facts about one request, filled in by its route. Never content."""

    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    status: int | None = None
    # The code of the error that ended the request, possibly in the middle of a stream.
    error: str | None = None
    model: str | None = None
    epoch: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    complete: bool = False
    client_gone: bool = False


def record_of(request: Request) -> Record:
    record: Record = request.scope[_RECORD]
    return record


class Edge:
    """An ASGI application around the application. `allowed_hosts`: None accepts any Host header."""

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, allowed_hosts: frozenset[str] | None, cors: Cors
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._allowed_hosts = allowed_hosts
        self._cors = cors
        self._num_active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # A GET whose body the HTTP server leaves out. It looks at its own scope, which stays as it is.
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        record = scope[_RECORD] = Record(_request_id(headers))
        self._num_active += 1
        try:
            with _span(scope, headers) as span:
                await self._serve(scope, _watched(receive, record), self._labelled(send, record, headers))
                _describe(span, scope, record)
        finally:
            self._num_active -= 1
            _log(scope, record)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope[_RECORD]
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            record.error = refusal.code
            await errors.response(refusal)(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._cors.is_preflight(scope["method"], headers):
            await Response(status_code=204, headers=self._cors.preflight_headers(headers))(
                scope, receive, send
            )
            return
        try:
            await self._app(scope, receive, send)
        except Exception:
            record.error = InternalError.default_reason.lower()
            log.exception("unexpected error", extra={"fields": {"request_id": record.request_id}})
            if record.status is None:
                await errors.response(errors.from_moesaic(InternalError("internal error")))(
                    scope, receive, send
                )

    def _refusal(self, scope: Scope, headers: Headers) -> HttpError | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return HttpError(431, f"the headers exceed {MAX_HEADER_BYTES} bytes", None, "headers_too_large")
        if self._allowed_hosts is not None and _host(headers) not in self._allowed_hosts:
            return errors.from_moesaic(
                InvalidArgument(
                    "this server does not answer to that name: gateway.allowed_hosts does not list it",
                    field="Host",
                    reason="BAD_HOST",
                )
            )
        if self._cors.is_preflight(scope["method"], headers):
            refusal = self._cors.refusal(headers)
            if refusal is not None:
                return refusal
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            return HttpError(413, f"the body exceeds {self._max_body_bytes} bytes", None, "body_too_large")
        if self._num_active > MAX_ACTIVE and scope["path"] not in _PROBES:
            return errors.from_moesaic(Overloaded(f"more than {MAX_ACTIVE} requests are being served"))
        return None

    def _labelled(self, send: Send, record: Record, headers: Headers) -> Send:
        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                labels = {"x-request-id": record.request_id, **self._cors.headers_for(headers)}
                MutableHeaders(scope=message).update(labels)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                record.complete = True
            await send(message)

        return labelled


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _host(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


def _watched(receive: Receive, record: Record) -> Receive:
    async def watched() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not record.complete:
            record.client_gone = True
        return message

    return watched


def _span(scope: Scope, headers: Headers) -> AbstractContextManager[trace.Span]:
    """A span that continues the caller's traceparent. The caller's baggage is dropped."""
    return telemetry.TRACER.start_as_current_span(
        scope["method"],
        context=telemetry.extract([(name, headers[name]) for name in _TRACE_HEADERS if name in headers]),
        kind=trace.SpanKind.SERVER,
    )


def _describe(span: trace.Span, scope: Scope, record: Record) -> None:
    route = _route(scope)
    span.update_name(f"{scope['method']} {route}")
    known = {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": record.status,
        "error.type": record.error,
        telemetry.REQUEST_ID: record.request_id,
        telemetry.MODEL: record.model,
        telemetry.EPOCH: record.epoch,
        telemetry.INPUT_TOKENS: record.prompt_tokens,
        telemetry.OUTPUT_TOKENS: record.completion_tokens,
    }
    span.set_attributes({name: value for name, value in known.items() if value is not None})


def _log(scope: Scope, record: Record) -> None:
    fields = {
        "request_id": record.request_id,
        "method": scope["method"],
        "path": _route(scope),
        "status": CLIENT_GONE if record.client_gone else record.status,
        "duration_ms": round((time.monotonic() - record.started_s) * 1000, 1),
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
    }
    level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
    log.log(level, "request", extra={"fields": {k: v for k, v in fields.items() if v is not None}})


def _route(scope: Scope) -> str:
    """The path template of the route, so that span names stay few; one name for all paths without a route."""
    return getattr(scope.get("route"), "path", "(no route)")
