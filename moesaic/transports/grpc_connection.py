"""One end of an HTTP/2 connection that carries gRPC streams, without I/O: bytes in, events out, bytes to send.

For the two places where a thread of grpcio between the socket and the computing costs more than the call itself: the
engine's way to a worker, and the worker's compute thread. The protocol is the library's (h2); here are only the headers
of gRPC and the five bytes before each of its messages, so either end may as well be any other gRPC implementation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import h2.events
from h2.errors import ErrorCodes
from h2.exceptions import (
    FlowControlError,
    FrameTooLargeError,
    ProtocolError,
    StreamClosedError,
    StreamIDTooLowError,
)

from moesaic.transports import grpc_headers
from moesaic.transports.grpc_headers import INTERNAL, UNAVAILABLE, Header
from moesaic.transports.grpc_messages import BadMessage, MessageReader, with_prefix
from moesaic.transports.http2 import WINDOW_BYTES, open_connection

# Room that the other end is given again at once: rarely, so that it costs nothing, and long before it has none.
_ACKNOWLEDGE_BYTES = WINDOW_BYTES // 2


class ConnectionBroken(Exception):
    """The other end does not keep to HTTP/2, or said goodbye: what `take_outgoing` still gives is for it, then close."""


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """A caller opened a stream (servers only). `method` is the full path, "/moesaic.v1.ExpertService/Compute"."""

    stream_id: int
    method: str


@dataclass(frozen=True, slots=True, eq=False)
class MessageReceived:
    """One whole message."""

    stream_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CallerEnded:
    """The caller sends no more messages (servers only); it may still wait for answers."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """No more comes on this stream, and nothing more can be sent on it. `code` is the gRPC status code (grpc.StatusCode.*.value[0])."""

    stream_id: int
    code: int
    details: str


Event = StreamOpened | MessageReceived | CallerEnded | StreamEnded


@dataclass(slots=True, eq=False)
class _Stream:
    """A call that the owner of the connection knows of."""

    reader: MessageReader
    # Servers: that the call is taken was said.
    accepted: bool
    # Of what came, what the other end was not yet given room for again.
    unacknowledged: int = 0


@dataclass(slots=True, eq=False)
class _Held:
    """What flow control does not let go yet, and the status that follows it."""

    pieces: deque[memoryview] = field(default_factory=deque)
    trailers: tuple[Header, ...] = ()


class GrpcConnection:
    """Belongs to one thread. Messages are bounded by `max_message_bytes` in both directions.

    It keeps at most one message that is not whole yet per stream and what `num_held_bytes` counts. Every word of the
    other end adds at most a few times its own length to the outgoing bytes (a PING is answered), never more: call
    `take_outgoing` after every `receive`, and close when what the socket does not take grows beyond a bound.
    """

    def __init__(self, *, client: bool, max_message_bytes: int) -> None:
        self._client = client
        self._max_message_bytes = max_message_bytes
        self._over = False
        self._met = False
        self._num_held_bytes = 0
        self._unacknowledged = 0
        self._streams: dict[int, _Stream] = {}
        # Also of streams that the owner has ended: their last messages go first.
        self._held: dict[int, _Held] = {}
        self._h2 = open_connection(client)

    @property
    def is_met(self) -> bool:
        """Whether the other end has shown that it speaks HTTP/2: its SETTINGS came."""
        return self._met

    @property
    def is_over(self) -> bool:
        """Either end said goodbye, or broke: nothing more comes, nothing can be sent. Write what is outgoing and close."""
        return self._over

    @property
    def num_held_bytes(self) -> int:
        """Of messages given to `send`, what the other end's flow control does not let go yet."""
        return self._num_held_bytes

    def open_stream(self, method: str, authority: str) -> int:
        """Client: begins a call; its id. Raises ConnectionBroken when this connection takes no more."""
        if self._over:
            raise ConnectionBroken("the connection is over")
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, grpc_headers.call(method, authority))
        except ProtocolError as error:
            raise _broken(error) from error
        self._streams[stream_id] = _Stream(MessageReader(self._max_message_bytes), accepted=True)
        return stream_id

    def accept_stream(self, stream_id: int) -> None:
        """Server: answers that the call is taken; before its first message."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.accepted:
            stream.accepted = True
            self._h2.send_headers(stream_id, grpc_headers.CALL_TAKEN)

    def send(self, stream_id: int, message: bytes) -> None:
        """Sends a message, as far as flow control lets it; the rest follows by itself as `receive` hears of room.

        What is sent on a stream that has ended is dropped. Raises ValueError for a message of more than
        `max_message_bytes`, and on a stream that is not accepted.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if len(message) > self._max_message_bytes:
            raise ValueError(f"message: longer than {self._max_message_bytes} bytes")
        if not stream.accepted:
            raise ValueError("stream_id: accept_stream comes before the first message")
        data = with_prefix(message)
        if stream_id not in self._held:
            try:
                self._h2.send_data(stream_id, data)
                return
            except (FlowControlError, FrameTooLargeError):
                self._held[stream_id] = _Held()
        self._held[stream_id].pieces.append(memoryview(data))
        self._num_held_bytes += len(data)
        self._let_go(stream_id)

    def end_stream(self, stream_id: int, code: int = 0, details: str = "") -> None:
        """Server: the status of the call, after all messages. Client: cancels. No more events come of the stream."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        if self._client:
            self._drop_held(stream_id)
            self._reset(stream_id, ErrorCodes.CANCEL)
            return
        trailers = grpc_headers.status(code, details)
        trailers = trailers if stream.accepted else (*grpc_headers.CALL_TAKEN, *trailers)
        if stream_id in self._held:
            self._held[stream_id].trailers = trailers
        else:
            self._finish(stream_id, trailers)

    def close(self) -> None:
        """Says goodbye (GOAWAY). Streams that are not ended are cut off, and so is what is held."""
        if not self._over:
            self._over = True
            self._forget_streams()
            self._h2.close_connection()

    def receive(self, raw: bytes | memoryview) -> list[Event]:
        """Takes what came. Raises ConnectionBroken; the connection is over then. Gives nothing once it is over."""
        if self._over:
            return []
        try:
            heard = self._h2.receive_data(raw)
        except ProtocolError as error:
            self._over = True
            self._forget_streams()
            raise _broken(error) from error
        events: list[Event] = []
        for event in heard:
            handle = self._HANDLERS.get(type(event))
            if handle is not None:
                handle(self, event, events)
        # Only now: an event may be of a stream that a later one ends.
        if self._held:
            for stream_id in tuple(self._held):
                self._let_go(stream_id)
        if self._unacknowledged >= _ACKNOWLEDGE_BYTES:
            self._acknowledge()
        return events

    def take_outgoing(self) -> bytes:
        """What is to be written to the socket now; each byte is given once."""
        return self._h2.data_to_send()

    def _settings_received(self, _: h2.events.RemoteSettingsChanged, __: list[Event]) -> None:
        self._met = True

    def _data_received(self, event: h2.events.DataReceived, events: list[Event]) -> None:
        stream_id = event.stream_id
        num_bytes = event.flow_controlled_length
        self._unacknowledged += num_bytes
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.unacknowledged += num_bytes
        try:
            for message in stream.reader.read(event.data):
                events.append(MessageReceived(stream_id, message))
        except BadMessage as bad:
            self._fail(stream_id, bad.code, bad.details, events)

    def _request_received(self, event: h2.events.RequestReceived, events: list[Event]) -> None:
        if self._over:
            return
        headers = dict(event.headers)
        if not grpc_headers.is_call(headers):
            self._finish(event.stream_id, grpc_headers.NOT_GRPC)
            return
        compresses = headers.get(b"grpc-encoding", b"identity") != b"identity"
        reader = MessageReader(self._max_message_bytes, compresses=compresses)
        self._streams[event.stream_id] = _Stream(reader, accepted=False)
        events.append(StreamOpened(event.stream_id, headers[b":path"].decode(errors="replace")))

    def _response_received(self, event: h2.events.ResponseReceived, events: list[Event]) -> None:
        ended = event.stream_ended is not None
        status = (
            grpc_headers.read_status(event.headers) if ended else grpc_headers.read_refusal(event.headers)
        )
        if status is not None:
            self._end_call(event.stream_id, *status, events)

    def _trailers_received(self, event: h2.events.TrailersReceived, events: list[Event]) -> None:
        # Of a caller they say nothing; that it has ended is heard next.
        if self._client:
            self._end_call(event.stream_id, *grpc_headers.read_status(event.headers), events)

    def _sending_ended(self, event: h2.events.StreamEnded, events: list[Event]) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        if self._client:
            self._end_call(event.stream_id, *grpc_headers.read_status(()), events)
        elif stream.reader.within_message:
            self._fail(event.stream_id, INTERNAL, "the caller ended within a message", events)
        else:
            events.append(CallerEnded(event.stream_id))

    def _stream_reset(self, event: h2.events.StreamReset, events: list[Event]) -> None:
        self._drop_held(event.stream_id)
        if self._streams.pop(event.stream_id, None) is not None:
            events.append(StreamEnded(event.stream_id, *grpc_headers.reset_status(event.error_code)))

    def _goodbye_received(self, event: h2.events.ConnectionTerminated, events: list[Event]) -> None:
        self._over = True
        details = f"the other end said goodbye: {grpc_headers.error_name(event.error_code)}"
        events.extend(StreamEnded(stream_id, UNAVAILABLE, details) for stream_id in self._streams)
        self._forget_streams()

    def _end_call(self, stream_id: int, code: int, details: str, events: list[Event]) -> None:
        """Client: the other end said how the call ended."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        if code == 0 and stream.reader.within_message:
            code, details = INTERNAL, "the call ended within a message"
        self._drop_held(stream_id)
        self._reset(stream_id, ErrorCodes.NO_ERROR)
        events.append(StreamEnded(stream_id, code, details))

    def _fail(self, stream_id: int, code: int, details: str, events: list[Event]) -> None:
        """Ends a call whose messages cannot be read."""
        self._drop_held(stream_id)
        self.end_stream(stream_id, code, details)
        events.append(StreamEnded(stream_id, code, details))

    def _finish(self, stream_id: int, headers: tuple[Header, ...]) -> None:
        """Server: the last headers of a call; a caller that has not ended is told that nobody listens any more."""
        # The other end may have reset the stream in the same piece of bytes; h2 may even have forgotten it.
        with suppress(StreamClosedError, StreamIDTooLowError):
            self._h2.send_headers(stream_id, headers, end_stream=True)
        self._reset(stream_id, ErrorCodes.NO_ERROR)

    def _reset(self, stream_id: int, error_code: ErrorCodes) -> None:
        with suppress(StreamClosedError):
            self._h2.reset_stream(stream_id, error_code)

    def _let_go(self, stream_id: int) -> None:
        """Sends of what is held as much as there is room for."""
        held = self._held[stream_id]
        connection = self._h2
        while held.pieces:
            room = min(connection.local_flow_control_window(stream_id), connection.max_outbound_frame_size)
            if room <= 0:  # below it where a setting took back what was given
                return
            piece = held.pieces.popleft()
            if room < len(piece):
                held.pieces.appendleft(piece[room:])
                piece = piece[:room]
            connection.send_data(stream_id, piece)
            self._num_held_bytes -= len(piece)
        del self._held[stream_id]
        if held.trailers:
            self._finish(stream_id, held.trailers)

    def _drop_held(self, stream_id: int) -> None:
        held = self._held.pop(stream_id, None)
        if held is not None:
            self._num_held_bytes -= sum(map(len, held.pieces))

    def _forget_streams(self) -> None:
        self._streams.clear()
        self._held.clear()
        self._num_held_bytes = 0

    def _acknowledge(self) -> None:
        """Gives the other end room for what it sent."""
        self._h2.increment_flow_control_window(self._unacknowledged)
        self._unacknowledged = 0
        for stream_id, stream in self._streams.items():
            if stream.unacknowledged:
                self._h2.increment_flow_control_window(stream.unacknowledged, stream_id)
                stream.unacknowledged = 0

    _HANDLERS: ClassVar[dict[type[h2.events.Event], Callable[[GrpcConnection, Any, list[Event]], None]]] = {
        h2.events.RemoteSettingsChanged: _settings_received,
        h2.events.DataReceived: _data_received,
        h2.events.RequestReceived: _request_received,
        h2.events.ResponseReceived: _response_received,
        h2.events.TrailersReceived: _trailers_received,
        h2.events.StreamEnded: _sending_ended,
        h2.events.StreamReset: _stream_reset,
        h2.events.ConnectionTerminated: _goodbye_received,
    }


def _broken(error: ProtocolError) -> ConnectionBroken:
    return ConnectionBroken(f"{type(error).__name__}: {error}")
