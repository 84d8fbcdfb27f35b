"""Servers over real sockets: errors, health, ports, and streams that are cancelled while they are traced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider

from moesaic import rpc, telemetry
from moesaic.errors import (
    DataLoss,
    InternalError,
    InvalidArgument,
    MoesaicError,
    Overloaded,
    from_rpc_error,
    from_status,
    to_status,
)
from moesaic.v1 import inference_pb2 as pb
from moesaic.v1 import inference_pb2_grpc as pb_grpc


class Service(pb_grpc.InferenceServiceServicer):
    """Fails as it is told to by the request."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        if request.text == "bug":
            raise KeyError("secret")
        raise Overloaded("full", field="text", retry_after_s=1.5)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            for _ in range(request.n):
                yield pb.GenerateResponse(text="x" * 1000)
            if request.text:
                raise InvalidArgument("late", field="text")
        finally:
            self.closed.set()


@pytest.fixture
async def served() -> AsyncIterator[tuple[Service, rpc.Server, grpc.aio.Channel]]:
    service = Service()
    server = rpc.Server(
        {
            rpc.INFERENCE_SERVICE: lambda grpc_server: pb_grpc.add_InferenceServiceServicer_to_server(
                service, grpc_server
            )
        }
    )
    port = await server.start("127.0.0.1", 0)
    async with rpc.aio_channel(f"127.0.0.1:{port}") as channel:
        yield service, server, channel
    await server.stop(0)


async def failure(call: Any) -> MoesaicError:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the call did not fail")


async def test_an_error_arrives_with_its_field_and_the_time_to_wait(served: tuple[Any, Any, Any]) -> None:
    stub = pb_grpc.InferenceServiceStub(served[2])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(), timeout=60)
    error = from_rpc_error(caught.value)
    assert isinstance(error, Overloaded)
    assert (error.message, error.field, error.retry_after_s) == ("full", "text", 1.5)


async def test_a_bug_is_an_internal_error_that_says_nothing(
    served: tuple[Any, Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    stub = pb_grpc.InferenceServiceStub(served[2])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(text="bug"), timeout=60)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InternalError) and error.message == "internal error"
    assert "unexpected error" in caplog.text


async def test_a_stream_may_fail_after_it_began(served: tuple[Any, Any, Any]) -> None:
    stub = pb_grpc.InferenceServiceStub(served[2])
    error = await failure(stub.Generate(pb.GenerateRequest(n=2, text="a"), timeout=60))
    assert isinstance(error, InvalidArgument) and error.field == "text"


async def test_what_is_no_message_is_an_error_of_the_call_it_came_for() -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return b"\xff"

    handlers = {"Tokenize": grpc.unary_unary_rpc_method_handler(answer)}
    handler = grpc.method_handlers_generic_handler(rpc.INFERENCE_SERVICE, handlers)
    server = rpc.Server({rpc.INFERENCE_SERVICE: lambda it: it.add_generic_rpc_handlers((handler,))})
    port = await server.start("127.0.0.1", 0)
    async with rpc.aio_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(DataLoss, match="no message of this call"):
            rpc.received(await pb_grpc.InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest()))
    await server.stop(0)


async def test_health_is_what_the_owner_says(served: tuple[Any, Any, Any]) -> None:
    _, server, channel = served
    health = health_pb2_grpc.HealthStub(channel)
    for serving, expected in ((False, "NOT_SERVING"), (True, "SERVING")):
        await server.set_serving(serving)
        for service in ("", rpc.INFERENCE_SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == expected


async def test_reflection_names_every_service(served: tuple[Any, rpc.Server, grpc.aio.Channel]) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="*")
    stub = reflection_pb2_grpc.ServerReflectionStub(served[2])
    async for answer in stub.ServerReflectionInfo(iter([request]), timeout=60):
        names = {service.name for service in answer.list_services_response.service}
        assert {rpc.INFERENCE_SERVICE, "grpc.health.v1.Health"} <= names
        break


async def test_a_port_in_use_is_refused_by_name(served: tuple[Any, Any, Any]) -> None:
    first, second = rpc.Server({}), rpc.Server({})
    port = await first.start("127.0.0.1", 0)
    try:
        with pytest.raises(InvalidArgument) as taken:
            await second.start("127.0.0.1", port)
        assert taken.value.field == "port"
    finally:
        await first.stop(0)


async def test_a_cancelled_stream_is_closed_at_once_and_its_trace_ends_quietly(
    served: tuple[Service, Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "TRACER", TracerProvider().get_tracer("test"))
    service, _, channel = served
    with caplog.at_level(logging.WARNING):
        call = pb_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest(n=100_000), timeout=60)
        await call.read()
        await asyncio.sleep(0)  # the server goes on writing
        call.cancel()
        async with asyncio.timeout(60):
            await service.closed.wait()
    assert not caplog.records


def test_every_error_survives_the_wire() -> None:
    for cls in _subclasses(MoesaicError):
        back = from_status(to_status(cls("what", field="f", reason="R", retry_after_s=2.0)))
        assert (back.code, back.message, back.field, back.reason, back.retry_after_s) == (
            cls.code,
            "what",
            "f",
            "R",
            2.0,
        )


def _subclasses(cls: type[MoesaicError]) -> list[type[MoesaicError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _subclasses(child))]


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_a_proxy_in_the_environment_is_not_asked(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    server = rpc.Server({})
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    question = health_pb2.HealthCheckRequest()
    async with rpc.aio_channel(address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(question, timeout=60)
    with rpc.channel(address) as blocking:
        await asyncio.to_thread(health_pb2_grpc.HealthStub(blocking).Check, question, timeout=60)
    await server.stop(0)


async def test_a_server_listens_on_ipv6() -> None:
    server = rpc.Server({})
    try:
        port = await server.start("::1", 0)
    except InvalidArgument:
        pytest.skip("this machine has no ::1")
    async with rpc.aio_channel(f"[::1]:{port}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    await server.stop(0)
