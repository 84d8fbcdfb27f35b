"""The gateway's link to one router: its address, its health, and calls with deadlines.

One task follows the router: it resolves the address, watches grpc.health.v1 there, and resolves the address
again when the stream breaks or the router does not serve. Calls use the channel to the newest address.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from moesaic import errors, rpc, telemetry
from moesaic.client.attempts import NO_ROUTER, ROUTER_UNREACHABLE
from moesaic.errors import MoesaicError, Unavailable, from_rpc_error
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1.inference_pb2_grpc import InferenceServiceStub

log = logging.getLogger(__name__)

UNARY_TIMEOUT_S = 30.0

_RESOLVE_TIMEOUT_S = 10.0
_RETRY_S = 0.3
# The address of a router that does not serve is resolved again after this time: another process may have
# taken its place.
_RESOLVE_AGAIN_S = 2.0
# The longest time that one watch of a serving router lasts. Then its address is resolved again.
_WATCH_S = 60.0
# The messages for failures of gRPC itself, whose own messages would reveal addresses.
_TRANSPORT_MESSAGES: dict[type[MoesaicError], str] = {
    errors.DeadlineExceeded: "the request did not end within the time it had",
    errors.Overloaded: "the router is busy",
}
# How gRPC words the refusal of a message, for which it has no status of its own.
_LARGER_THAN_MAX = "larger than max"

ResolveRouter = Callable[[], Awaitable[str]]


class RouterLink:
    """Calls to the router at the address that `resolve_router` returned last."""

    def __init__(
        self,
        name: str,
        resolve_router: ResolveRouter,
        *,
        timeout_s: float,
        on_health: Callable[[], None],
    ) -> None:
        """`name`: for the log. `timeout_s`: the longest duration of a call. `on_health` is called when `serving` has
        changed."""
        self._name = name
        self._resolve_router = resolve_router
        self._timeout_s = timeout_s
        self._on_health = on_health
        self._address = ""
        self._channel: grpc.aio.Channel | None = None
        self._serving = False
        self._has_served = False
        self._closing = False
        # The last problem that was logged. A problem that repeats is logged once.
        self._problem = ""
        self._follower: asyncio.Task[None] | None = None
        # The closing of channels to earlier addresses, which lasts until their last call has ended.
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> bool:
        """Whether the last health status of the router was SERVING."""
        return self._serving

    @property
    def connected(self) -> bool:
        """Whether the router has an address, whatever its health."""
        return self._channel is not None

    def start(self) -> None:
        self._follower = asyncio.create_task(self._follow(), name=f"link-{self._name}")

    async def close(self) -> None:
        """Ends the watch. Calls that still run fail with Unavailable."""
        self._closing = True
        tasks = [task for task in (self._follower, *self._retiring) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._serving = False
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    async def generate(
        self, request: pb.GenerateRequest, *, timeout_s: float
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Streams the messages of one call. Closing the generator cancels the call."""
        with _errors_of_ours():
            call = self._stub().Generate(request, timeout=timeout_s, metadata=_metadata(request.request_id))
            try:
                async for response in call:
                    yield rpc.received(response)
            finally:
                call.cancel()

    async def tokenize(self, request: pb.TokenizeRequest, request_id: str) -> pb.TokenizeResponse:
        with _errors_of_ours():
            response: pb.TokenizeResponse = await self._stub().Tokenize(
                request, timeout=UNARY_TIMEOUT_S, metadata=_metadata(request_id)
            )
        return rpc.received(response)

    async def detokenize(self, request: pb.DetokenizeRequest, request_id: str) -> pb.DetokenizeResponse:
        with _errors_of_ours():
            response: pb.DetokenizeResponse = await self._stub().Detokenize(
                request, timeout=UNARY_TIMEOUT_S, metadata=_metadata(request_id)
            )
        return rpc.received(response)

    async def model_info(self, request_id: str) -> pb.GetModelInfoResponse:
        with _errors_of_ours():
            response: pb.GetModelInfoResponse = await self._stub().GetModelInfo(
                pb.GetModelInfoRequest(), timeout=UNARY_TIMEOUT_S, metadata=_metadata(request_id)
            )
        return rpc.received(response)

    def _stub(self) -> InferenceServiceStub:
        if self._channel is None:
            raise Unavailable("no router has been found yet", reason=NO_ROUTER)
        return InferenceServiceStub(self._channel)

    async def _follow(self) -> None:
        # The flag is needed beside the cancellation, which a resolver may swallow (asyncio.wait_for of Python
        # 3.11 does).
        while not self._closing:
            try:
                async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
                    address = await self._resolve_router()
                self._use(address)
                await self._watch()
            except Exception as error:  # any failure of resolver or network may be gone at the next attempt
                self._set_serving(False)
                self._report(error)
            await asyncio.sleep(_RETRY_S)

    def _use(self, address: str) -> None:
        """From now on calls go to `address`; those on an older channel may end there."""
        if self._channel is not None and address != self._address:
            retired = asyncio.create_task(self._channel.close(self._timeout_s))
            self._retiring.add(retired)
            retired.add_done_callback(self._retiring.discard)
            self._channel = None
        if self._channel is None:
            self._address, self._channel = address, rpc.aio_channel(address, watchful=True)

    async def _watch(self) -> None:
        """Follows the router's health until the address must be resolved again.

        Raises when the stream breaks.
        """
        call = health_pb2_grpc.HealthStub(self._channel).Watch(
            health_pb2.HealthCheckRequest(service=rpc.INFERENCE_SERVICE), timeout=_WATCH_S
        )
        try:
            while True:
                async with asyncio.timeout(None if self._serving else _RESOLVE_AGAIN_S):
                    status = await call.read()
                if status is grpc.aio.EOF:
                    raise Unavailable("the router ended the watch")
                self._set_serving(status.status == health_pb2.HealthCheckResponse.SERVING)
        except TimeoutError:
            return
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        finally:
            call.cancel()

    def _set_serving(self, serving: bool) -> None:
        if serving != self._serving:
            message = "router serves" if serving else "router does not serve"
            log.info(message, extra={"fields": {"router": self._name}})
            self._problem = ""
            self._has_served = True
            self._serving = serving
            self._on_health()

    def _report(self, error: Exception) -> None:
        problem = (
            error.code().name if isinstance(error, grpc.RpcError) else f"{type(error).__name__}: {error}"
        )
        if problem != self._problem:
            # A router is unreachable while its cluster starts. Only the loss of one that has served is a
            # warning.
            level = logging.WARNING if self._has_served else logging.INFO
            fields = {"router": self._name, "problem": problem}
            log.log(level, "no connection to a router", extra={"fields": fields})
        self._problem = problem


@contextmanager
def _errors_of_ours() -> Iterator[None]:
    """Turns gRPC's exceptions into errors that may be shown to a caller."""
    try:
        yield
    except grpc.RpcError as error:
        raise _without_internals(error) from error
    except asyncio.CancelledError:
        # gRPC raises it for a call whose channel is closed, too. Only the cancellation of the task itself is
        # passed on.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unavailable("the gateway is stopping", reason="STOPPING") from None


def _without_internals(error: grpc.RpcError) -> MoesaicError:
    """The router's own error unchanged, or a failure of the transport without addresses."""
    known = from_rpc_error(error)
    if rpc_status.from_call(error) is not None:
        return known
    if isinstance(known, errors.Overloaded) and _LARGER_THAN_MAX in (error.details() or ""):
        return errors.InvalidArgument(
            "the request or its answer is larger than a message may be", reason=errors.TOO_LARGE
        )
    if type(known) in _TRANSPORT_MESSAGES:
        return type(known)(_TRANSPORT_MESSAGES[type(known)])
    return Unavailable("the router cannot be reached", reason=ROUTER_UNREACHABLE)


def _metadata(request_id: str) -> list[tuple[str, str]]:
    return [*telemetry.inject(), (telemetry.REQUEST_ID_METADATA, request_id)]
