"""The HTTP routes. Each one parses a body, calls a router and renders the result."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import moesaic
from gateway.edge import Record, record_of
from gateway.openai import errors, replies, strict_json, token_lists
from gateway.openai.errors import HttpError
from gateway.openai.renderers import (
    DEGRADED_HEADER,
    ChatRenderer,
    CompletionRenderer,
    Identity,
    Renderer,
    degraded_header,
)
from gateway.openai.request_output import Piece, RequestOutput
from gateway.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from gateway.openai.server_sent_events import DONE, EventStream, error_event, event, unless_gone
from gateway.upstream.routers import Routers
from moesaic.errors import Cancelled, InternalError, MoesaicError, NotFound, Unavailable
from moesaic.v1 import inference_pb2 as pb

log = logging.getLogger(__name__)

_BODY_TIMEOUT_S = 60.0
# The time that a slow client has to read a stream, beyond the router's own deadline.
_READING_MARGIN_S = 60.0


class JsonRequest(Request):
    """A request whose JSON body is read once and parsed strictly."""

    async def read(self) -> None:
        """Raises InvalidArgument, Cancelled, or HTTPException with 408 or 415."""
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the body must have the content type application/json")
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await self.body()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from error
        except ClientDisconnect as error:
            raise Cancelled("the client went away") from error
        self._value = strict_json.parse(body)

    async def json(self) -> Any:
        return self._value


class JsonRoute(APIRoute):
    """A route whose request has a strictly parsed body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if request.method == "POST":
                request = JsonRequest(request.scope, request.receive)
                await request.read()
            return await handle(request)

        return handle_strictly


def build_app(routers: Routers, *, max_body_bytes: int, timeout_s: float) -> FastAPI:
    """The application. `timeout_s`: the deadline of a generation."""
    app = FastAPI(
        title="Moesaic",
        version=moesaic.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        max_body_size=max_body_bytes,
        # `Edge` makes the spans. The framework's own would record bodies that fail validation.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    groups = [_generation(routers, timeout_s), _tokens(routers), _models(routers), _state(routers)]
    for routes in (*groups, _index(app, groups)):
        app.include_router(routes)
    _handle_errors(app, max_body_bytes)
    return app


def _generation(routers: Routers, timeout_s: float) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions", response_model=replies.CompletionReply)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await _answer(request, routers, CompletionRenderer(body, _identity(request)), timeout_s)

    @routes.post("/v1/chat/completions", response_model=replies.ChatReply)
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        return await _answer(request, routers, ChatRenderer(body, _identity(request)), timeout_s)

    return routes


def _tokens(routers: Routers) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/tokenize", response_model=replies.TokenizeReply)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        call = body.call()
        tokens = await routers.tokenize(call, record_of(request).request_id)
        content = await token_lists.tokenize_reply(tokens, with_strings=call.return_tokens)
        return Response(content, media_type="application/json")

    @routes.post("/detokenize")
    async def detokenize(request: Request, body: DetokenizeRequest) -> replies.DetokenizeReply:
        text = await routers.detokenize(body.call(), record_of(request).request_id)
        return replies.DetokenizeReply(prompt=text.text)

    return routes


def _models(routers: Routers) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models(request: Request) -> replies.ModelList:
        return replies.ModelList(object="list", data=[await _model(routers, request)])

    @routes.get("/v1/models/{model_id:path}")
    async def model(request: Request, model_id: str) -> replies.Model:
        served = await _model(routers, request)
        if served.id != model_id:
            raise NotFound("no such model", field="model", reason="MODEL_NOT_FOUND")
        return served

    return routes


def _state(routers: Routers) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health", response_class=Response)
    @routes.get("/ready", response_class=Response)
    async def ready() -> Response:
        _check_serving(routers)
        return Response()

    @routes.get("/version")
    async def version() -> replies.Version:
        return replies.Version(version=moesaic.__version__)

    return routes


def _index(app: FastAPI, groups: Sequence[APIRouter]) -> APIRouter:
    index = replies.Index(
        name=app.title,
        version=app.version,
        routes=[route.path for routes in groups for route in routes.routes if isinstance(route, APIRoute)],
        openapi=str(app.openapi_url),
    )
    routes = APIRouter()

    @routes.get("/")
    async def show() -> replies.Index:
        return index

    return routes


def _check_serving(routers: Routers) -> None:
    if not routers.serving:
        raise Unavailable("no router serves at the moment", reason="NOT_READY")


async def _model(routers: Routers, request: Request) -> replies.Model:
    """The served model, listed only while it can be used: clients take the list for a health check."""
    _check_serving(routers)
    info = await routers.model_info(record_of(request).request_id)
    defaults = info.sampling_defaults
    return replies.Model(
        id=info.model,
        object="model",
        created=info.created,
        owned_by="moesaic",
        root=info.model,
        parent=None,
        max_model_len=info.max_model_len,
        sampling_defaults=replies.SamplingDefaults(
            temperature=_shortest(defaults.temperature),
            top_p=_shortest(defaults.top_p),
            top_k=defaults.top_k,
            min_p=_shortest(defaults.min_p),
            repetition_penalty=_shortest(defaults.repetition_penalty),
        ),
    )


def _shortest(value: float) -> float:
    """A float32 by the fewest digits that name it, as it was written."""
    return float(f"{value:.7g}")


def _identity(request: Request) -> Identity:
    return Identity(record_of(request).request_id, int(time.time()))


async def _answer(request: Request, routers: Routers, renderer: Renderer, timeout_s: float) -> Response:
    record = record_of(request)
    calls = renderer.calls()
    output = RequestOutput(len(calls), renderer.request.num_choices)
    pieces = _pieces(record, renderer, output, routers.generate(calls, record.request_id))
    if not renderer.request.stream:
        return await unless_gone(request, _whole(renderer, output, pieces))
    # The first piece is awaited here, so that an error before it is sent with an HTTP status of its own.
    first = await unless_gone(request, anext(pieces))
    events = _events(record, renderer, output, first, pieces)
    return EventStream(events, source=pieces, timeout_s=timeout_s + _READING_MARGIN_S)


async def _pieces(
    record: Record,
    renderer: Renderer,
    output: RequestOutput,
    messages: AsyncGenerator[tuple[int, pb.GenerateResponse], None],
) -> AsyncGenerator[Piece, None]:
    """The router's messages as pieces, checked to be complete. Errors name the fields of the HTTP API."""
    try:
        async with aclosing(messages):
            async for prompt_number, message in messages:
                piece = output.add(prompt_number, message)
                record.model, record.epoch = output.model, output.epoch
                record.prompt_tokens = output.prompt_tokens
                record.completion_tokens = output.completion_tokens
                if piece is not None:
                    yield piece
        output.check_complete()
    except MoesaicError as error:
        name = renderer.params.get(error.field or "")
        if name is None:
            raise
        raise errors.about_field(error, name) from error


async def _whole(renderer: Renderer, output: RequestOutput, pieces: AsyncGenerator[Piece, None]) -> Response:
    choices: dict[int, list[Piece]] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            choices.setdefault(piece.index, []).append(piece)
    reply = renderer.reply(output, [choices[index] for index in sorted(choices)])
    degraded = output.degraded
    headers = None if degraded is None else {DEGRADED_HEADER: degraded_header(degraded)}
    return Response(reply.model_dump_json(exclude_unset=True), headers=headers, media_type="application/json")


async def _events(
    record: Record,
    renderer: Renderer,
    output: RequestOutput,
    first: Piece,
    rest: AsyncGenerator[Piece, None],
) -> AsyncGenerator[bytes, None]:
    """The events of a stream: chunks, requested usage, and [DONE], or an error as the last event."""
    try:
        for chunk in renderer.chunks(output, first):
            yield event(chunk)
        async for piece in rest:
            for chunk in renderer.chunks(output, piece):
                yield event(chunk)
    except MoesaicError as error:
        failure = errors.from_moesaic(error)
    except Exception:
        log.exception("unexpected error", extra={"fields": {"request_id": record.request_id}})
        failure = errors.from_moesaic(InternalError("internal error"))
    else:
        options = renderer.request.stream_options
        if options is not None and options.include_usage:
            yield event(renderer.usage_chunk(output))
        yield DONE
        return
    record.error = failure.code
    yield error_event(failure.envelope, output.completion_tokens)


def _handle_errors(app: FastAPI, max_body_bytes: int) -> None:
    """Registers the handlers that put every error into OpenAI's envelope."""

    def refuse(request: Request, error: HttpError, headers: Mapping[str, str] | None = None) -> Response:
        record_of(request).error = error.code
        return errors.response(error, headers)

    @app.exception_handler(MoesaicError)
    async def ours(request: Request, error: MoesaicError) -> Response:
        return refuse(request, errors.from_moesaic(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(request, errors.from_validation(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 413:
            error.detail = f"the body exceeds {max_body_bytes} bytes"
        return refuse(request, errors.from_http(error), error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return refuse(request, errors.from_moesaic(InternalError("internal error")))
