"""The only file that makes gRPC channels and servers: limits, keepalive, health, reflection, errors, tracing.

Every server answers grpc.health.v1 and reflection, turns exceptions into google.rpc.Status in one place, and
continues the caller's trace. Health is per service and starts as NOT_SERVING until the owner of the server
sets it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc_status import rpc_status
from opentelemetry import trace

from moesaic import telemetry
from moesaic.addresses import join_address
from moesaic.errors import DataLoss, InternalError, InvalidArgument, MoesaicError, to_status

if TYPE_CHECKING:
    from grpc_health.v1.health import aio as health_aio

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

INFERENCE_SERVICE = "moesaic.v1.InferenceService"
ROUTER_CONTROL_SERVICE = "moesaic.v1.RouterControlService"
EXPERT_SERVICE = "moesaic.v1.ExpertService"
WORKER_CONTROL_SERVICE = "moesaic.v1.WorkerControlService"
CONTROL_SERVICE = "moesaic.v1.ControlService"

# The trailer of a call of Generate whose answer is not the full one.
DEGRADED_TRAILER = "moesaic-degraded"

# The value that marks the end of a handler's stream.
_END = object()

PUBLIC_MESSAGE_BYTES = 16 << 20
# The answer to a prefill chunk of a few thousand rows, one row per (token, expert), fits with room to spare.
DATA_MESSAGE_BYTES = 256 << 20

_CHANNEL_OPTIONS = (
    # A proxy of the environment is for the world outside: it cannot reach a cluster's own addresses.
    ("grpc.enable_http_proxy", 0),
    # A restarted peer is reached again within half a second; the defaults wait for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # This is also the time that one attempt may take: a peer that stalls for a moment must not be given up.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),
)
# A peer that stands still is noticed after 10 to 15 s.
_PATIENT = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Without this a stopped peer goes unnoticed for a minute, whatever the keepalive options are.
    ("grpc.http2.ping_timeout_ms", 5_000),
)
# After 1.5 to 2.5 s: for channels to a router, whose answers another one can go on with.
_WATCHFUL = (
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 1_500),
    ("grpc.http2.ping_timeout_ms", 1_500),
    # While tokens arrive the caller sends nothing else. By default it would ping twice, and then once a minute.
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS = (
    # Two servers must not share a port by accident.
    ("grpc.so_reuseport", 0),
    # During long generations no bytes flow; clients that send pings meanwhile must not be disconnected.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
)


def _limits(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    )


def _channel_options(max_message_bytes: int, watchful: bool) -> tuple[tuple[str, int], ...]:
    return _CHANNEL_OPTIONS + (_WATCHFUL if watchful else _PATIENT) + _limits(max_message_bytes)


def aio_channel(
    target: str, *, max_message_bytes: int = PUBLIC_MESSAGE_BYTES, watchful: bool = False
) -> grpc.aio.Channel:
    """An asyncio channel to HOST:PORT. `watchful`: whether a peer that stands still is noticed in about 2 s."""
    return grpc.aio.insecure_channel(target, options=_channel_options(max_message_bytes, watchful))


def channel(
    target: str, *, max_message_bytes: int = DATA_MESSAGE_BYTES, watchful: bool = False
) -> grpc.Channel:
    """The same for callers that block, with threads (the engine's links to workers)."""
    return grpc.insecure_channel(target, options=_channel_options(max_message_bytes, watchful))


def received(answer: _Answer | None) -> _Answer:
    """What came over a channel for asyncio, which gives None for bytes that are no message of the call's kind.

    Raises DataLoss for these. (A channel with threads ends such a call with INTERNAL by itself.)
    """
    if answer is None:
        raise DataLoss("the other side sent bytes that are no message of this call", reason="NOT_A_MESSAGE")
    return answer


class Server:
    """A gRPC server with health, reflection, error mapping and tracing.

    `services` pairs full service names with the functions that add their servicers:
    `{"moesaic.v1.ExpertService": lambda server: add_ExpertServiceServicer_to_server(servicer, server)}`.
    """

    def __init__(
        self,
        services: dict[str, Callable[[grpc.aio.Server], None]],
        *,
        max_message_bytes: int = PUBLIC_MESSAGE_BYTES,
        max_concurrent_rpcs: int | None = None,
    ) -> None:
        # Imported here because an installation of the client alone has neither package.
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        self._server = grpc.aio.server(
            interceptors=[_Boundary()],
            options=_SERVER_OPTIONS + _limits(max_message_bytes),
            maximum_concurrent_rpcs=max_concurrent_rpcs,
        )
        self._services = tuple(services)
        self._health: health_aio.HealthServicer = health.aio.HealthServicer()
        self._status = health_pb2.HealthCheckResponse
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for add_servicer in services.values():
            add_servicer(self._server)
        reflection.enable_server_reflection(
            (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; returns the port (a free one for 0). Raises InvalidArgument when it is taken."""
        address = join_address(host, port)
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise InvalidArgument(
                f"cannot listen on {address}: the port is in use or the host is not this machine's",
                field="port",
                reason="PORT_IN_USE",
            ) from error
        await self.set_serving(False)
        await self._server.start()
        return bound

    async def set_serving(self, serving: bool) -> None:
        """Sets the answer of grpc.health.v1, for every service and for the server as a whole."""
        status = self._status.SERVING if serving else self._status.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls and cancels running ones that have not ended within `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        await self._server.wait_for_termination()


def request_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The caller's x-request-id, or an empty string."""
    for key, value in context.invocation_metadata() or ():
        if key == telemetry.REQUEST_ID_METADATA and isinstance(value, str):
            return value
    return ""


class _Boundary(grpc.aio.ServerInterceptor):
    """The one place where an exception becomes a status and where a server's span starts."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/moesaic."):
            return handler
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(method, handler.stream_stream), **serializers
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(method, handler.unary_stream), **serializers
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                _guard_unary(method, handler.stream_unary), **serializers
            )
        return grpc.unary_unary_rpc_method_handler(_guard_unary(method, handler.unary_unary), **serializers)


def _guard_unary(
    method: str, call: Callable[[Any, Any], Awaitable[Any]]
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        with trace.use_span(_server_span(method, context), end_on_exit=True):
            try:
                return await call(request, context)
            except Exception as error:
                await _abort(method, context, error)

    return guarded


def _guard_stream(
    method: str, call: Callable[[Any, Any], AsyncGenerator[Any, None]]
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        span = _server_span(method, context)
        responses = call(request, context)
        try:
            while True:
                # The span is current only while the handler runs: a cancelled stream is closed in another
                # context.
                with trace.use_span(span):
                    response = await anext(responses, _END)
                if response is _END:
                    return
                yield response
        except Exception as error:
            await _abort(method, context, error)
        finally:
            await responses.aclose()
            span.end()

    return guarded


def _server_span(method: str, context: Any) -> trace.Span:
    return telemetry.TRACER.start_span(
        method.strip("/"),
        context=telemetry.extract(context.invocation_metadata()),
        kind=trace.SpanKind.SERVER,
    )


async def _abort(method: str, context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, MoesaicError):
        log.exception("unexpected error", extra={"fields": {"method": method}})
        error = InternalError("internal error")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
