"""Either end of the direct stream, without a socket: bytes in, events and bytes out."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import strategies as st
from support.fuzzing import fuzzed
from support.mutations import bytes_near

from moesaic.transports.grpc_connection import ConnectionBroken, GrpcConnection, StreamOpened
from moesaic.transports.grpc_messages import with_prefix

METHOD = "/moesaic.v1.ExpertService/Compute"
MAX_MESSAGE_BYTES = 4096
MESSAGES = st.lists(st.binary(max_size=200), max_size=3)
# A frame of the other end adds at most a few times its own length to what is to be sent, beside our own words.
MAX_TIMES, OWN_BYTES = 8, 64 << 10


def connection(*, client: bool) -> GrpcConnection:
    return GrpcConnection(client=client, max_message_bytes=MAX_MESSAGE_BYTES)


def as_caller(messages: list[bytes]) -> bytes:
    """What a caller says: a stream, its messages, and a stream that it gives up."""
    caller = connection(client=True)
    first, second = (caller.open_stream(METHOD, "worker") for _ in range(2))
    for message in messages:
        caller.send(first, message)
    caller.end_stream(second)
    return caller.take_outgoing()


def as_worker(messages: list[bytes]) -> bytes:
    """What a worker says to a caller with two streams."""
    worker = connection(client=False)
    for event in worker.receive(as_caller([])):
        if isinstance(event, StreamOpened):
            worker.accept_stream(event.stream_id)
    for message in messages:
        worker.send(1, message)
    worker.end_stream(1, 3, "no")
    return worker.take_outgoing()


def spoilt(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return bytes_near(whole) | st.builds(bytes.__add__, whole, st.lists(FRAMES, max_size=6).map(b"".join))


# Frames of any kind, flags and stream, each with the length that it says.
FRAMES = st.builds(
    lambda kind, flags, stream, body: (
        len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body
    ),
    st.integers(0, 12),
    st.integers(0, 255) | st.sampled_from((0, 1, 4, 5, 8, 9)),
    st.sampled_from((0, 1, 1, 2, 3, 5, 2**31 - 1)),
    st.binary(max_size=40) | st.binary(max_size=20).map(with_prefix),
)


@fuzzed("http2_of_callers", spoilt(MESSAGES.map(as_caller)), examples=150)
def test_what_a_caller_says_is_messages_or_ends_its_connection(raw: bytes) -> None:
    worker = connection(client=False)
    with suppress(ConnectionBroken):
        for event in worker.receive(raw):
            if isinstance(event, StreamOpened):
                worker.accept_stream(event.stream_id)
                worker.send(event.stream_id, b"answer")
        worker.receive(raw)
    assert len(worker.take_outgoing()) <= MAX_TIMES * len(raw) + OWN_BYTES
    worker.close()


@fuzzed("http2_of_workers", spoilt(MESSAGES.map(as_worker)), examples=150)
def test_what_a_worker_says_is_messages_or_ends_its_connection(raw: bytes) -> None:
    caller = connection(client=True)
    streams = [caller.open_stream(METHOD, "worker") for _ in range(2)]
    with suppress(ConnectionBroken):
        caller.receive(raw)
        for stream_id in streams:
            caller.send(stream_id, b"call")
        caller.receive(raw)
    assert len(caller.take_outgoing()) <= 2 * MAX_TIMES * len(raw) + OWN_BYTES
    caller.close()
