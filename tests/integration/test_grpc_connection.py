"""Both ends of a GrpcConnection against grpcio over loopback: it is gRPC, not something like it."""

from __future__ import annotations

import asyncio
import queue
import selectors
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import grpc
import pytest

from moesaic.transports.grpc_connection import (
    CallerEnded,
    Event,
    GrpcConnection,
    MessageReceived,
    StreamEnded,
    StreamOpened,
)

WAIT_S = 60.0
READ_BYTES = 256 << 10
MAX_MESSAGE_BYTES = 8 << 20
ECHO = "/test.Service/Echo"
ABORT = "/test.Service/Abort"
DETAILS = "not so: 100 % naïve\nsecond line"
SMALL = bytes(range(256)) * 32
LARGE = SMALL * 256
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

Found = TypeVar("Found", bound=Event)


class Caller:
    """Our client end, and the socket that a caller has besides."""

    def __init__(self, port: int) -> None:
        self.connection = GrpcConnection(client=True, max_message_bytes=MAX_MESSAGE_BYTES)
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._authority = f"127.0.0.1:{port}"
        self._events: list[Event] = []

    def open(self, method: str = ECHO) -> int:
        return self.connection.open_stream(method, self._authority)

    def next(self, kind: type[Found], stream_id: int) -> Found:
        """The next event of the stream, which must be of this kind."""
        while True:
            for place, event in enumerate(self._events):
                if event.stream_id == stream_id:
                    del self._events[place]
                    assert isinstance(event, kind), event
                    return event
            self._exchange()

    def _exchange(self) -> None:
        self._socket.sendall(self.connection.take_outgoing())
        raw = self._socket.recv(READ_BYTES)
        assert raw, "the other end closed the connection"
        self._events += self.connection.receive(raw)

    def close(self) -> None:
        self.connection.close()
        with self._socket, suppress(OSError):
            self._socket.sendall(self.connection.take_outgoing())


async def echo(messages: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message


async def abort(
    messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, DETAILS)


@asynccontextmanager
async def grpcio_server() -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    server = grpc.aio.server(options=UNLIMITED)
    methods = {
        "Echo": grpc.stream_stream_rpc_method_handler(echo),
        "Abort": grpc.stream_stream_rpc_method_handler(abort),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Service", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, port
    finally:
        await server.stop(None)


async def calling(port: int, act: Callable[[Caller], None]) -> None:
    """Runs a caller that blocks beside the server's loop."""

    def run() -> None:
        caller = Caller(port)
        try:
            act(caller)
        finally:
            caller.close()

    async with asyncio.timeout(2 * WAIT_S):
        await asyncio.to_thread(run)


async def test_our_caller_and_a_server_of_grpcio_exchange_messages_small_and_large() -> None:
    def act(caller: Caller) -> None:
        stream_id = caller.open()
        for message in [SMALL, b"", LARGE, SMALL, LARGE + b"!"]:
            caller.connection.send(stream_id, message)
            assert caller.next(MessageReceived, stream_id).data == message

    async with grpcio_server() as (_, port):
        await calling(port, act)


async def test_our_caller_has_many_messages_under_way_on_several_streams() -> None:
    def act(caller: Caller) -> None:
        streams = [caller.open() for _ in range(3)]
        batch = [SMALL[:size] for size in range(0, 8_000, 100)] + [LARGE]
        for message in batch:
            for stream_id in streams:
                caller.connection.send(stream_id, message)
        for stream_id in streams:
            assert [caller.next(MessageReceived, stream_id).data for _ in batch] == batch

    async with grpcio_server() as (_, port):
        await calling(port, act)


async def test_our_caller_hears_status_and_details_of_an_abort_and_goes_on() -> None:
    def act(caller: Caller) -> None:
        stream_id = caller.open(ABORT)
        caller.connection.send(stream_id, SMALL)
        assert caller.next(MessageReceived, stream_id).data == SMALL
        assert caller.next(StreamEnded, stream_id) == StreamEnded(stream_id, 9, DETAILS)
        again = caller.open()
        caller.connection.send(again, SMALL)
        assert caller.next(MessageReceived, again).data == SMALL

    async with grpcio_server() as (_, port):
        await calling(port, act)


async def test_our_caller_hears_that_a_method_is_unknown() -> None:
    def act(caller: Caller) -> None:
        stream_id = caller.open("/test.Service/Nothing")
        assert caller.next(StreamEnded, stream_id).code == grpc.StatusCode.UNIMPLEMENTED.value[0]

    async with grpcio_server() as (_, port):
        await calling(port, act)


async def test_a_cancelled_call_of_ours_is_over_on_both_ends_and_leaves_the_connection() -> None:
    def act(caller: Caller) -> None:
        for _ in range(200):
            stream_id = caller.open()
            caller.connection.send(stream_id, SMALL)
            assert caller.next(MessageReceived, stream_id).data == SMALL
            caller.connection.end_stream(stream_id)

    async with grpcio_server() as (_, port):
        await calling(port, act)


async def test_a_server_of_grpcio_that_stops_ends_our_calls_as_unavailable() -> None:
    loop = asyncio.get_running_loop()

    async with grpcio_server() as (server, port):

        def act(caller: Caller) -> None:
            stream_id = caller.open()
            caller.connection.send(stream_id, SMALL)
            caller.next(MessageReceived, stream_id)
            stopping = asyncio.run_coroutine_threadsafe(server.stop(WAIT_S), loop)
            assert caller.next(StreamEnded, stream_id).code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert caller.connection.is_over
            # A server with patience waits for its callers to go.
            caller.close()
            stopping.result(WAIT_S)

        await calling(port, act)


class Answerer:
    """Our server end in a thread of its own: echoes, ends as the caller does, and aborts when told to."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.ended: queue.Queue[StreamEnded] = queue.Queue()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)

    @contextmanager
    def running(self) -> Iterator[Answerer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.close()
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()

    def _serve(self) -> None:
        connections: dict[socket.socket, GrpcConnection] = {}
        with selectors.DefaultSelector() as selector, self._listener, self._stopped:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(WAIT_S)]
                if self._stopped in ready or not ready:
                    break
                for source in ready:
                    assert isinstance(source, socket.socket)
                    if source is self._listener:
                        accepted, _ = self._listener.accept()
                        accepted.settimeout(WAIT_S)
                        connections[accepted] = GrpcConnection(
                            client=False, max_message_bytes=MAX_MESSAGE_BYTES
                        )
                        selector.register(accepted, selectors.EVENT_READ)
                    elif not self._turn(source, connections[source]):
                        selector.unregister(source)
                        source.close()
            for accepted, connection in connections.items():
                connection.close()
                # Whose caller has gone is closed already.
                with accepted, suppress(OSError):
                    accepted.sendall(connection.take_outgoing())

    def _turn(self, accepted: socket.socket, connection: GrpcConnection) -> bool:
        """Whether the connection goes on."""
        try:
            raw = accepted.recv(READ_BYTES)
            for event in connection.receive(raw):
                self._answer(connection, event)
            accepted.sendall(connection.take_outgoing())
        except ConnectionError:
            return False
        return bool(raw) and not connection.is_over

    def _answer(self, connection: GrpcConnection, event: Event) -> None:
        match event:
            case StreamOpened(stream_id, method):
                if method == ECHO:
                    connection.accept_stream(stream_id)
                else:
                    connection.end_stream(stream_id, grpc.StatusCode.UNIMPLEMENTED.value[0], method)
            case MessageReceived(stream_id, b"abort"):
                connection.end_stream(stream_id, grpc.StatusCode.FAILED_PRECONDITION.value[0], DETAILS)
            case MessageReceived(stream_id, b"goodbye"):
                connection.close()
            case MessageReceived(stream_id, data):
                connection.send(stream_id, data)
            case CallerEnded(stream_id):
                connection.end_stream(stream_id)
            case StreamEnded():
                self.ended.put(event)


@pytest.fixture
def answerer() -> Iterator[Answerer]:
    with Answerer().running() as answerer:
        yield answerer


@pytest.fixture
def channel(answerer: Answerer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{answerer.port}", options=UNLIMITED) as channel:
        yield channel


def exchange(channel: grpc.Channel, messages: list[bytes], method: str = ECHO) -> list[bytes]:
    return list(channel.stream_stream(method)(iter(messages), timeout=WAIT_S))


def refusal(channel: grpc.Channel, messages: list[bytes], method: str = ECHO) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        exchange(channel, messages, method)
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


def test_a_channel_of_grpcio_exchanges_messages_small_and_large_with_our_end(channel: grpc.Channel) -> None:
    messages = [SMALL, b"", LARGE, SMALL, LARGE + b"!"]
    assert exchange(channel, messages) == messages
    assert exchange(channel, []) == []


def test_a_call_of_one_message_either_way_is_a_stream_like_others(channel: grpc.Channel) -> None:
    assert channel.unary_unary(ECHO)(SMALL, timeout=WAIT_S) == SMALL


def test_a_channel_of_grpcio_hears_our_status_and_details_and_goes_on(channel: grpc.Channel) -> None:
    assert refusal(channel, [SMALL, b"abort"]) == (grpc.StatusCode.FAILED_PRECONDITION, DETAILS)
    assert refusal(channel, [b"abort"]) == (grpc.StatusCode.FAILED_PRECONDITION, DETAILS)
    assert exchange(channel, [SMALL]) == [SMALL]


def test_a_channel_of_grpcio_hears_that_a_method_is_unknown(channel: grpc.Channel) -> None:
    unknown = "/test.Service/Nothing"
    assert refusal(channel, [SMALL], unknown) == (grpc.StatusCode.UNIMPLEMENTED, unknown)


def test_a_message_that_is_too_long_ends_the_call_alone(channel: grpc.Channel) -> None:
    status, details = refusal(channel, [SMALL, bytes(MAX_MESSAGE_BYTES + 1)])
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_MESSAGE_BYTES) in details
    assert exchange(channel, [SMALL]) == [SMALL]


def test_a_compressed_message_is_refused_as_grpc_says(answerer: Answerer) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{answerer.port}", compression=grpc.Compression.Gzip) as channel:
        assert refusal(channel, [bytes(10_000)])[0] is grpc.StatusCode.UNIMPLEMENTED


def test_the_deadline_of_a_channel_of_grpcio_ends_the_call_on_our_end(
    answerer: Answerer, channel: grpc.Channel
) -> None:
    release = threading.Event()

    def messages() -> Iterator[bytes]:
        yield SMALL
        release.wait(WAIT_S)

    answers = channel.stream_stream(ECHO)(messages(), timeout=0.2)
    try:
        assert next(answers) == SMALL
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    finally:
        release.set()
    assert caught.value is answers
    assert answers.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert answerer.ended.get(timeout=WAIT_S).code == grpc.StatusCode.CANCELLED.value[0]


def test_two_streams_of_one_channel_are_answered_at_once(channel: grpc.Channel) -> None:
    asked: list[queue.SimpleQueue[bytes | None]] = [queue.SimpleQueue(), queue.SimpleQueue()]
    streams = [channel.stream_stream(ECHO)(iter(sent.get, None), timeout=WAIT_S) for sent in asked]
    for message in [SMALL, LARGE, b"last"]:
        for sent in asked:
            sent.put(message)
        assert [next(stream) for stream in streams] == [message, message]
    for sent in asked:
        sent.put(None)
    assert [list(stream) for stream in streams] == [[], []]


def test_our_goaway_ends_the_calls_of_a_channel_of_grpcio_which_comes_again(channel: grpc.Channel) -> None:
    assert refusal(channel, [b"goodbye"])[0] is grpc.StatusCode.UNAVAILABLE
    answers = channel.stream_stream(ECHO)(iter([SMALL]), timeout=WAIT_S, wait_for_ready=True)
    assert list(answers) == [SMALL]


async def test_an_asyncio_channel_of_grpcio_writes_reads_and_cancels(answerer: Answerer) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{answerer.port}", options=UNLIMITED) as channel:
        call = channel.stream_stream(ECHO)(timeout=WAIT_S)
        for message in [SMALL, LARGE, b""]:
            await call.write(message)
            assert await call.read() == message
        assert call.cancel()
        ended = await asyncio.to_thread(answerer.ended.get, timeout=WAIT_S)
        assert ended.code == grpc.StatusCode.CANCELLED.value[0]
        again = channel.stream_stream(ECHO)(timeout=WAIT_S)
        await again.write(SMALL)
        await again.done_writing()
        assert await again.read() == SMALL
        assert await again.code() is grpc.StatusCode.OK


def test_ends_of_ours_understand_each_other_over_a_socket(answerer: Answerer) -> None:
    caller = Caller(answerer.port)
    try:
        stream_id = caller.open()
        for message in [SMALL, LARGE, b""]:
            caller.connection.send(stream_id, message)
            assert caller.next(MessageReceived, stream_id).data == message
        caller.connection.send(stream_id, b"abort")
        assert caller.next(StreamEnded, stream_id) == StreamEnded(stream_id, 9, DETAILS)
    finally:
        caller.close()
