"""gRPC over HTTP/2 without I/O: whole messages in order, whatever the pieces, and nothing that the other end can do to us."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable

import grpc
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, StreamReset, TrailersReceived
from h2.settings import SettingCodes
from hyperframe.frame import ContinuationFrame, HeadersFrame, PingFrame, SettingsFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.transports.grpc_connection import (
    CallerEnded,
    ConnectionBroken,
    Event,
    GrpcConnection,
    MessageReceived,
    StreamEnded,
    StreamOpened,
)
from moesaic.transports.http2 import MAX_STREAMS

METHOD = "/moesaic.v1.ExpertService/Compute"
AUTHORITY = "worker:7"
MAX_MESSAGE_BYTES = 8 << 20
REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", METHOD),
    (":authority", AUTHORITY),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
RESPONSE = [(":status", "200"), ("content-type", "application/grpc")]
MESSAGES = st.lists(st.binary(max_size=300) | st.sampled_from([bytes(20_000), bytes(70_000)]), max_size=6)


def code(status: grpc.StatusCode) -> int:
    number: int = status.value[0]
    return number


def prefixed(message: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BL", compressed, len(message)) + message


def messages(events: Iterable[Event], stream_id: int = 1) -> list[bytes]:
    return [
        event.data for event in events if isinstance(event, MessageReceived) and event.stream_id == stream_id
    ]


def ends(events: Iterable[Event]) -> list[StreamEnded]:
    return [event for event in events if isinstance(event, StreamEnded)]


class Pair:
    """Both ends are ours; `size` is how much of the bytes is given at once."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES, size: int = 1 << 20) -> None:
        self.client = GrpcConnection(client=True, max_message_bytes=max_message_bytes)
        self.server = GrpcConnection(client=False, max_message_bytes=max_message_bytes)
        self.size = size
        self.exchange()

    def exchange(self) -> tuple[list[Event], list[Event]]:
        """What the client and the server hear until both are silent."""
        at_client: list[Event] = []
        at_server: list[Event] = []
        while True:
            up, down = self.client.take_outgoing(), self.server.take_outgoing()
            if not up and not down:
                return at_client, at_server
            at_server += fed(self.server, up, self.size)
            at_client += fed(self.client, down, self.size)

    def opened(self) -> int:
        stream_id = self.client.open_stream(METHOD, AUTHORITY)
        assert self.exchange() == ([], [StreamOpened(stream_id, METHOD)])
        self.server.accept_stream(stream_id)
        self.exchange()
        return stream_id


def fed(end: GrpcConnection, raw: bytes, size: int) -> list[Event]:
    return [event for start in range(0, len(raw), size) for event in end.receive(raw[start : start + size])]


class Other:
    """Another implementation at the other end, with flow control as small as one likes, and free to misbehave."""

    def __init__(self, *, client: bool, window: int = 65_535) -> None:
        self.ours = GrpcConnection(client=not client, max_message_bytes=MAX_MESSAGE_BYTES)
        self.h2 = H2Connection(H2Configuration(client_side=client, validate_outbound_headers=False))
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.exchange()

    def exchange(self) -> tuple[list[Event], list[object]]:
        """What ours and the other hear until both are silent."""
        at_ours: list[Event] = []
        at_other: list[object] = []
        while True:
            up, down = self.h2.data_to_send(), self.ours.take_outgoing()
            if not up and not down:
                return at_ours, at_other
            if up:
                at_ours += self.ours.receive(up)
            if down:
                at_other += self.h2.receive_data(down)

    def calls(self, headers: list[tuple[str, str]] = REQUEST) -> list[Event]:
        """Opens stream 1, as the caller."""
        self.h2.send_headers(1, headers)
        return self.exchange()[0]

    def is_called(self) -> int:
        stream_id = self.ours.open_stream(METHOD, AUTHORITY)
        self.exchange()
        return stream_id


def test_a_call_is_opened_taken_answered_and_ended() -> None:
    pair = Pair()
    stream_id = pair.opened()
    pair.client.send(stream_id, b"question")
    assert messages(pair.exchange()[1]) == [b"question"]
    pair.server.send(stream_id, b"answer")
    pair.server.end_stream(stream_id)
    at_client, _ = pair.exchange()
    assert messages(at_client) == [b"answer"]
    assert at_client[-1] == StreamEnded(stream_id, 0, "")


@settings(max_examples=60, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=3), st.sampled_from([1, 3, 7, 100, 1 << 14, 1 << 20]))
def test_messages_come_whole_and_in_order_whatever_the_pieces(batches: list[list[bytes]], size: int) -> None:
    if any(len(message) > 300 for batch in batches for message in batch):
        size = max(size, 4_096)
    pair = Pair(size=size)
    streams = [pair.opened() for _ in batches]
    for stream_id, batch in zip(streams, batches, strict=True):
        for message in batch:
            pair.client.send(stream_id, message)
            pair.server.send(stream_id, message[::-1])
    at_client, at_server = pair.exchange()
    for stream_id, batch in zip(streams, batches, strict=True):
        assert messages(at_server, stream_id) == batch
        assert messages(at_client, stream_id) == [message[::-1] for message in batch]


@settings(max_examples=60, deadline=None)
@given(MESSAGES, st.data())
def test_messages_may_be_split_over_frames_and_joined_in_one(batch: list[bytes], data: st.DataObject) -> None:
    other = Other(client=True)
    other.calls()
    raw = b"".join(map(prefixed, batch))
    events: list[Event] = []
    while raw:
        cut = data.draw(st.integers(0, min(len(raw), 16_384)) | st.just(min(len(raw), 16_384)))
        other.h2.send_data(1, raw[:cut])
        events += other.exchange()[0]
        raw = raw[cut:]
    assert messages(events) == batch


@settings(max_examples=60, deadline=None)
@given(
    st.lists(MESSAGES, min_size=1, max_size=3),
    st.integers(0, 3_000),
    st.integers(2_000, 50_000),
    st.booleans(),
)
def test_no_more_is_sent_than_the_other_end_has_room_for(
    batches: list[list[bytes]], window: int, step: int, ended: bool
) -> None:
    other = Other(client=True, window=window)
    expected = {1 + 2 * i: b"".join(map(prefixed, batch)) for i, batch in enumerate(batches)}
    heard: list[object] = []
    for stream_id, batch in zip(expected, batches, strict=True):
        other.h2.send_headers(stream_id, REQUEST)
        heard += other.exchange()[1]
        other.ours.accept_stream(stream_id)
        for message in batch:
            other.ours.send(stream_id, message)
        if ended:
            other.ours.end_stream(stream_id, 3, "no")
    heard += other.exchange()[1]
    assert other.ours.num_held_bytes == sum(map(len, expected.values())) - sum(map(len, received(heard)))
    while other.ours.num_held_bytes:
        other.h2.increment_flow_control_window(step)
        for stream_id in expected:
            if not any(
                isinstance(event, TrailersReceived) and event.stream_id == stream_id for event in heard
            ):
                other.h2.increment_flow_control_window(step, stream_id)
        heard += other.exchange()[1]
    for stream_id, raw in expected.items():
        assert b"".join(received(heard, stream_id)) == raw
    assert sum(isinstance(event, TrailersReceived) for event in heard) == (len(batches) if ended else 0)


def received(events: Iterable[object], stream_id: int | None = None) -> list[bytes]:
    return [
        event.data
        for event in events
        if isinstance(event, DataReceived) and stream_id in (None, event.stream_id)
    ]


def test_a_window_that_a_setting_widens_lets_the_rest_go() -> None:
    other = Other(client=True, window=0)
    other.calls()
    other.ours.accept_stream(1)
    other.ours.send(1, b"late")
    assert received(other.exchange()[1]) == []
    other.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 100})
    assert b"".join(received(other.exchange()[1])) == prefixed(b"late")
    assert other.ours.num_held_bytes == 0


def test_a_window_that_a_setting_takes_back_loses_nothing_of_what_is_held() -> None:
    other = Other(client=True, window=100)
    other.calls()
    other.ours.accept_stream(1)
    message = bytes(range(250))
    other.ours.send(1, message)
    heard = other.exchange()[1]
    for window in (10, 1_000):
        other.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        heard += other.exchange()[1]
    assert b"".join(received(heard)) == prefixed(message)
    assert other.ours.num_held_bytes == 0


def test_a_large_message_goes_in_few_frames_between_ends_of_ours() -> None:
    pair = Pair()
    stream_id = pair.opened()
    message = bytes(range(256)) * (4 << 10)
    pair.client.send(stream_id, message)
    raw = pair.client.take_outgoing()
    assert len(message) < len(raw) < len(message) + 100
    assert messages(pair.server.receive(raw)) == [message]


def test_much_can_be_sent_since_room_is_given_back_and_rarely_spoken_of() -> None:
    pair = Pair()
    stream_id = pair.opened()
    message = bytes(4 << 20)
    num_words = 0
    for _ in range(40):
        pair.client.send(stream_id, message)
        assert len(messages(pair.server.receive(pair.client.take_outgoing()))) == 1
        word = pair.server.take_outgoing()
        num_words += bool(word)
        pair.client.receive(word)
    assert pair.client.num_held_bytes == 0
    assert 0 < num_words <= 8


def test_the_caller_ends_and_still_hears_the_answers() -> None:
    other = Other(client=True)
    other.calls()
    other.h2.send_data(1, prefixed(b"question"), end_stream=True)
    events = other.exchange()[0]
    assert messages(events) == [b"question"]
    assert events[-1] == CallerEnded(1)
    other.ours.accept_stream(1)
    other.ours.send(1, b"answer")
    assert received(other.exchange()[1]) == [prefixed(b"answer")]


def test_a_call_may_be_refused_before_it_is_taken() -> None:
    pair = Pair()
    stream_id = pair.client.open_stream("/other/Method", AUTHORITY)
    pair.exchange()
    pair.server.end_stream(stream_id, code(grpc.StatusCode.UNIMPLEMENTED), "no such method")
    assert pair.exchange() == ([StreamEnded(stream_id, 12, "no such method")], [])


@given(st.text(max_size=300))
def test_details_come_through_as_they_are(details: str) -> None:
    pair = Pair()
    stream_id = pair.opened()
    pair.server.end_stream(stream_id, 3, details)
    readable = details.encode(errors="replace").decode()
    assert pair.exchange()[0] == [StreamEnded(stream_id, 3, readable)]


def test_details_are_cut_rather_than_more_than_headers_may_hold() -> None:
    pair = Pair()
    stream_id = pair.opened()
    pair.server.end_stream(stream_id, 3, "é" * 100_000)
    assert pair.exchange()[0] == [StreamEnded(stream_id, 3, "é" * 1_000)]


def test_a_caller_that_cancels_is_heard_and_what_is_held_for_it_dropped() -> None:
    other = Other(client=True)
    other.calls()
    other.ours.accept_stream(1)
    other.ours.send(1, bytes(1 << 20))
    assert other.ours.num_held_bytes
    other.h2.reset_stream(1, ErrorCodes.CANCEL)
    assert [end.code for end in ends(other.exchange()[0])] == [code(grpc.StatusCode.CANCELLED)]
    assert other.ours.num_held_bytes == 0


def test_our_client_cancels_by_ending_and_hears_no_more_of_it() -> None:
    pair = Pair()
    stream_id = pair.opened()
    pair.server.send(stream_id, b"under way")
    pair.client.end_stream(stream_id)
    at_client, at_server = pair.exchange()
    assert at_client == []
    assert [end.code for end in ends(at_server)] == [code(grpc.StatusCode.CANCELLED)]
    pair.client.send(stream_id, b"dropped")
    pair.server.send(stream_id, b"dropped")
    pair.server.end_stream(stream_id)
    assert pair.exchange() == ([], [])


@pytest.mark.parametrize(
    ("reset", "status"),
    [
        (ErrorCodes.REFUSED_STREAM, grpc.StatusCode.UNAVAILABLE),
        (ErrorCodes.CANCEL, grpc.StatusCode.CANCELLED),
        (ErrorCodes.ENHANCE_YOUR_CALM, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ErrorCodes.INADEQUATE_SECURITY, grpc.StatusCode.PERMISSION_DENIED),
        (ErrorCodes.NO_ERROR, grpc.StatusCode.INTERNAL),
        (ErrorCodes.PROTOCOL_ERROR, grpc.StatusCode.INTERNAL),
        (4_711, grpc.StatusCode.INTERNAL),
    ],
)
def test_a_reset_stands_for_a_status(reset: int, status: grpc.StatusCode) -> None:
    other = Other(client=False)
    stream_id = other.is_called()
    other.h2.reset_stream(stream_id, reset)
    assert [end.code for end in ends(other.exchange()[0])] == [code(status)]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(":status", "503"), ("content-type", "text/html")], grpc.StatusCode.UNAVAILABLE),
        ([(":status", "404")], grpc.StatusCode.UNIMPLEMENTED),
        ([(":status", "418")], grpc.StatusCode.UNKNOWN),
        ([(":status", "4" * 5_000)], grpc.StatusCode.UNKNOWN),
        ([(":status", "200"), ("content-type", "text/html")], grpc.StatusCode.UNKNOWN),
        ([*RESPONSE, ("grpc-status", "7")], grpc.StatusCode.PERMISSION_DENIED),
        ([(":status", "503"), ("grpc-status", "7")], grpc.StatusCode.PERMISSION_DENIED),
        ([*RESPONSE, ("grpc-status", "seven")], grpc.StatusCode.UNKNOWN),
        ([*RESPONSE, ("grpc-status", "42")], grpc.StatusCode.UNKNOWN),
        ([*RESPONSE, ("grpc-status", "9" * 5_000)], grpc.StatusCode.UNKNOWN),
        (RESPONSE, grpc.StatusCode.UNKNOWN),
    ],
)
def test_an_answer_of_headers_alone_is_the_status(
    headers: list[tuple[str, str]], status: grpc.StatusCode
) -> None:
    other = Other(client=False)
    stream_id = other.is_called()
    other.h2.send_headers(stream_id, headers, end_stream=True)
    assert [end.code for end in ends(other.exchange()[0])] == [code(status)]


@pytest.mark.parametrize(
    ("trailers", "status"),
    [
        ([("grpc-status", "0")], grpc.StatusCode.INTERNAL),
        ([("grpc-status", "9")], grpc.StatusCode.FAILED_PRECONDITION),
        ([("other", "0")], grpc.StatusCode.UNKNOWN),
        ([], grpc.StatusCode.UNKNOWN),
    ],
)
def test_an_answer_cut_off_within_a_message_is_never_ok(
    trailers: list[tuple[str, str]], status: grpc.StatusCode
) -> None:
    other = Other(client=False)
    stream_id = other.is_called()
    other.h2.send_headers(stream_id, RESPONSE)
    other.h2.send_data(stream_id, prefixed(b"message")[:-1], end_stream=not trailers)
    if trailers:
        other.h2.send_headers(stream_id, trailers, end_stream=True)
    assert [end.code for end in ends(other.exchange()[0])] == [code(status)]


def test_a_refusal_that_goes_on_with_a_body_ends_the_call_at_once() -> None:
    other = Other(client=False)
    stream_id = other.is_called()
    other.h2.send_headers(stream_id, [(":status", "502"), ("content-type", "text/html")])
    other.h2.send_data(stream_id, b"<html>" * 100)
    events = other.exchange()[0]
    assert [end.code for end in ends(events)] == [code(grpc.StatusCode.UNAVAILABLE)]
    assert messages(events, stream_id) == []


@pytest.mark.parametrize(
    "changed", [(":method", "GET"), ("content-type", "application/json"), ("content-type", "")]
)
def test_a_request_that_is_no_call_is_refused_in_terms_of_http(changed: tuple[str, str]) -> None:
    other = Other(client=True)
    headers = [changed if name == changed[0] else (name, value) for name, value in REQUEST]
    other.h2.send_headers(1, headers)
    at_ours, at_other = other.exchange()
    assert at_ours == []
    assert [event.headers for event in at_other if hasattr(event, "headers")] == [[(b":status", b"415")]]


@pytest.mark.parametrize(
    ("encoding", "status"),
    [(None, grpc.StatusCode.INTERNAL), ("gzip", grpc.StatusCode.UNIMPLEMENTED)],
)
def test_a_compressed_message_ends_the_call(encoding: str | None, status: grpc.StatusCode) -> None:
    other = Other(client=True)
    other.calls([*REQUEST, ("grpc-encoding", encoding)] if encoding else REQUEST)
    other.h2.send_data(1, prefixed(b"first") + prefixed(b"second", compressed=1) + prefixed(b"third"))
    at_ours, at_other = other.exchange()
    assert messages(at_ours) == [b"first"]
    assert [end.code for end in ends(at_ours)] == [code(status)]
    told = [dict(event.headers) for event in at_other if hasattr(event, "headers")]
    assert [int(headers[b"grpc-status"]) for headers in told] == [code(status)]


def test_a_message_that_is_too_long_ends_its_stream_alone() -> None:
    pair = Pair(max_message_bytes=100)
    pair.client = GrpcConnection(client=True, max_message_bytes=1_000)
    pair.server = GrpcConnection(client=False, max_message_bytes=100)
    long, short = pair.opened(), pair.opened()
    pair.client.send(long, bytes(101))
    pair.client.send(short, bytes(100))
    at_client, at_server = pair.exchange()
    exhausted = code(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert [(end.stream_id, end.code) for end in ends(at_client)] == [(long, exhausted)]
    assert [(end.stream_id, end.code) for end in ends(at_server)] == [(long, exhausted)]
    assert messages(at_server, short) == [bytes(100)]
    with pytest.raises(ValueError, match="message"):
        pair.server.send(short, bytes(101))


def test_nothing_is_sent_on_a_call_that_is_not_taken() -> None:
    pair = Pair()
    stream_id = pair.client.open_stream(METHOD, AUTHORITY)
    pair.exchange()
    with pytest.raises(ValueError, match="accept_stream"):
        pair.server.send(stream_id, b"early")


def test_a_caller_that_ends_within_a_message_is_told_so() -> None:
    other = Other(client=True)
    other.calls()
    other.h2.send_data(1, prefixed(b"message")[:-1], end_stream=True)
    assert [end.code for end in ends(other.exchange()[0])] == [code(grpc.StatusCode.INTERNAL)]


def test_what_is_misread_does_not_matter_when_its_stream_is_gone_already() -> None:
    other = Other(client=True)
    other.calls()
    other.h2.send_data(1, prefixed(b"", compressed=1))
    other.h2.reset_stream(1)
    other.h2.send_headers(3, REQUEST)
    events = other.exchange()[0]
    assert [end.stream_id for end in ends(events)] == [1]
    assert events[-1] == StreamOpened(3, METHOD)


def test_goaway_ends_every_stream_and_the_connection() -> None:
    pair = Pair()
    streams = [pair.opened(), pair.opened()]
    pair.server.send(streams[0], b"last words")
    pair.server.close()
    at_client, _ = pair.exchange()
    assert messages(at_client) == [b"last words"]
    unavailable = code(grpc.StatusCode.UNAVAILABLE)
    assert [(end.stream_id, end.code) for end in ends(at_client)] == [(id_, unavailable) for id_ in streams]
    assert pair.client.is_over
    assert pair.server.is_over
    with pytest.raises(ConnectionBroken):
        pair.client.open_stream(METHOD, AUTHORITY)
    pair.client.close()
    assert pair.exchange() == ([], [])


def test_frames_behind_goaway_are_no_fault() -> None:
    other = Other(client=False)
    stream_id = other.is_called()
    other.h2.close_connection()
    ping = PingFrame(0, opaque_data=b"farewell").serialize()
    events = other.ours.receive(other.h2.data_to_send() + ping)
    assert [end.stream_id for end in ends(events)] == [stream_id]
    assert other.ours.receive(ping) == []


def test_no_more_streams_are_taken_than_announced() -> None:
    pair = Pair()
    for _ in range(MAX_STREAMS):
        pair.opened()
    with pytest.raises(ConnectionBroken, match="streams"):
        pair.client.open_stream(METHOD, AUTHORITY)


@pytest.mark.parametrize("by_caller", [True, False])
def test_ended_streams_make_room_for_others(by_caller: bool) -> None:
    pair = Pair()
    for _ in range(3 * MAX_STREAMS):
        stream_id = pair.opened()
        (pair.client if by_caller else pair.server).end_stream(stream_id)
        pair.exchange()


def test_a_caller_that_opens_more_than_announced_is_cut_off() -> None:
    ours = GrpcConnection(client=False, max_message_bytes=100)
    other = H2Connection(H2Configuration(client_side=True))
    other.initiate_connection()
    for stream_id in range(1, 2 * MAX_STREAMS + 3, 2):
        other.send_headers(stream_id, REQUEST)
    with pytest.raises(ConnectionBroken, match="streams"):
        ours.receive(other.data_to_send())
    assert ours.take_outgoing()
    assert ours.is_over
    assert ours.receive(b"more") == []


@pytest.mark.parametrize(
    "flood",
    [
        PingFrame(0, opaque_data=bytes(8)).serialize(),
        SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 70_000}).serialize(),
        b"\0\0\0\0\0\0\0\0\x01",  # an empty DATA frame
        b"\0\0\0\0\0\0\0\0\x09",  # the same on a stream that was reset
        b"\0\0\4\3\0\0\0\0\x01\0\0\0\x08",  # RST_STREAM
    ],
    ids=["ping", "settings", "empty data", "data for the dead", "reset"],
)
def test_a_flood_is_answered_with_no_more_than_a_few_times_its_length(flood: bytes) -> None:
    other = Other(client=True)
    other.calls()
    other.h2.send_headers(9, REQUEST)
    other.h2.reset_stream(9)
    other.exchange()
    for _ in range(3):
        events = other.ours.receive(flood * 1_000)
        assert len(events) <= 1
        assert len(other.ours.take_outgoing()) <= 3 * len(flood) * 1_000
    assert other.ours.num_held_bytes == 0


def test_a_stream_opened_and_reset_again_and_again_leaves_nothing_behind() -> None:
    other = Other(client=True)
    for stream_id in range(1, 2_001, 2):
        other.h2.send_headers(stream_id, REQUEST)
        other.h2.reset_stream(stream_id)
    events = other.exchange()[0]
    assert len(events) == 2_000
    assert len(ends(events)) == 1_000
    other.h2.send_headers(2_001, REQUEST)
    assert other.exchange()[0] == [StreamOpened(2_001, METHOD)]


def test_a_list_of_headers_without_end_breaks_the_connection() -> None:
    other = Other(client=True)
    raw = HeadersFrame(1, data=b"").serialize() + ContinuationFrame(1, data=b"").serialize() * 100
    with pytest.raises(ConnectionBroken):
        other.ours.receive(raw)


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_list_of_headers_is_kept_no_further_than_announced(size: int) -> None:
    """It says nothing but how large its table shall be."""
    other = Other(client=True)
    frames = [HeadersFrame(1, data=b"\x20" * size), *[ContinuationFrame(1, data=b"\x20" * size)] * 19]
    with pytest.raises(ConnectionBroken, match="header block"):
        other.ours.receive(b"".join(frame.serialize() for frame in frames))


def test_headers_longer_than_announced_break_the_connection() -> None:
    other = Other(client=True)
    other.h2.send_headers(1, [*REQUEST, ("x-long", "x" * 100_000)])
    with pytest.raises(ConnectionBroken, match="header"):
        other.ours.receive(other.h2.data_to_send())


def test_bytes_that_are_no_http2_break_the_connection() -> None:
    ours = GrpcConnection(client=False, max_message_bytes=100)
    with pytest.raises(ConnectionBroken):
        ours.receive(b"GET / HTTP/1.1\r\n\r\n")
    assert ours.is_over


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 255), st.integers(0, 5), st.binary(max_size=40))),
)
def test_garbage_in_frames_breaks_the_connection_or_nothing(
    client: bool, frames: list[tuple[int, int, int, bytes]]
) -> None:
    other = Other(client=client)
    if client:
        other.calls()
    else:
        other.is_called()
    raw = b"".join(
        struct.pack(">HBBBL", len(body) >> 8, len(body) & 255, kind, flags, stream_id) + body
        for kind, flags, stream_id, body in frames
    )
    with contextlib.suppress(ConnectionBroken):
        other.ours.receive(raw)
        other.ours.receive(raw)
    other.ours.take_outgoing()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_bytes_break_the_connection_or_nothing(data: st.DataObject) -> None:
    other = Other(client=True)
    for stream_id in (1, 3):
        other.h2.send_headers(stream_id, REQUEST)
        other.h2.send_data(stream_id, prefixed(b"message" * 20))
    other.h2.reset_stream(1)
    raw = bytearray(other.h2.data_to_send())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(raw)))
    with contextlib.suppress(ConnectionBroken):
        for event in other.ours.receive(bytes(raw[:end])):
            if isinstance(event, StreamOpened):
                other.ours.accept_stream(event.stream_id)
                other.ours.send(event.stream_id, b"answer")
                other.ours.end_stream(event.stream_id)
    other.ours.take_outgoing()


def test_a_reset_of_ours_is_answered_by_no_event() -> None:
    other = Other(client=False)
    stream_id = other.is_called()
    other.ours.end_stream(stream_id)
    _, at_other = other.exchange()
    assert [event.error_code for event in at_other if isinstance(event, StreamReset)] == [ErrorCodes.CANCEL]
