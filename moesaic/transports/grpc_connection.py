"""One end of an HTTP/2 connection that carries gRPC streams, without I/O: bytes and events.

It serves the two places where a grpcio thread between the socket and the computation costs more than the call
itself: the engine's connection to a worker, and the worker's compute thread. h2 implements HTTP/2; only
gRPC's headers and the five bytes before each message are added here, so the other end may be any gRPC
implementation.
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

# How many received bytes are acknowledged together: seldom enough to cost nothing, and long before the window
# is used up.
_ACKNOWLEDGE_BYTES = WINDOW_BYTES // 2


class ConnectionBroken(Exception):
    """The other end violated HTTP/2 or sent GOAWAY. Send what `take_outgoing` returns, then close."""


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """A caller opened a stream (servers only). `method` is a path: "/moesaic.v1.ExpertService/Compute"."""

    stream_id: int
    method: str


@dataclass(frozen=True, slots=True, eq=False)
class MessageReceived:
    """One whole message."""

    stream_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CallerEnded:
    """The caller sends no more messages (servers only). It may still wait for answers."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Nothing more arrives on this stream or can be sent on it. `code` is the gRPC status code, as in
    grpc.StatusCode.OK.value[0]."""

    stream_id: int
    code: int
    details: str


Event = StreamOpened | MessageReceived | CallerEnded | StreamEnded


@dataclass(slots=True, eq=False)
class _Stream:
    """A call that the owner of the connection has not ended."""

    reader: MessageReader
    # Whether a server has sent the headers that accept the call.
    accepted: bool
    # Received bytes that no window update has returned to the other end yet.
    unacknowledged: int = 0


@dataclass(slots=True, eq=False)
class _Held:
    """Bytes that flow control does not allow to be sent yet, and the status that follows them."""

    pieces: deque[memoryview] = field(default_factory=deque)
    trailers: tuple[Header, ...] = ()


class GrpcConnection:
    """Belongs to one thread. `max_message_bytes` bounds messages in both directions.

    It keeps at most one incomplete message per stream and what `num_held_bytes` counts. A frame of the other
    end adds at most a few times its own length to the outgoing bytes (a PING is answered): call
    `take_outgoing` after every `receive`, and close the connection when the bytes that the socket does not
    accept exceed a bound.
    """

    def __init__(self, *, client: bool, max_message_bytes: int) -> None:
        self._client = client
        self._max_message_bytes = max_message_bytes
        self._over = False
        self._handshake_done = False
        self._num_held_bytes = 0
        self._unacknowledged = 0
        self._streams: dict[int, _Stream] = {}
        # Includes streams that the owner has ended: their last messages are sent before the status.
        self._held: dict[int, _Held] = {}
        self._h2 = open_connection(client)

    @property
    def handshake_done(self) -> bool:
        """Whether the other end speaks HTTP/2: its SETTINGS have arrived."""
        return self._handshake_done

    @property
    def is_over(self) -> bool:
        """Whether either end sent GOAWAY or the protocol was violated: nothing more arrives or can be sent.
        Write the outgoing bytes and close the socket."""
        return self._over

    @property
    def num_held_bytes(self) -> int:
        """The bytes given to `send` that the other end's flow control does not allow to be sent yet."""
        return self._num_held_bytes

    def open_stream(self, method: str, authority: str) -> int:
        """Client: begins a call; its id. Raises ConnectionBroken when no more streams can be opened."""
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
        """Server: sends the headers that accept the call, which must precede its first message."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.accepted:
            stream.accepted = True
            self._h2.send_headers(stream_id, grpc_headers.CALL_ACCEPTED)

    def send(self, stream_id: int, message: bytes) -> None:
        """Sends a message as far as flow control allows; `receive` sends the rest when the window grows.

        A message on a stream that has ended is dropped. Raises ValueError for a message of more than
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
        self._send_held(stream_id)

    def end_stream(self, stream_id: int, code: int = 0, details: str = "") -> None:
        """Server: sends the status of the call after all its messages. Client: cancels it. The stream has no
        more events."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        if self._client:
            self._drop_held(stream_id)
            self._reset(stream_id, ErrorCodes.CANCEL)
            return
        trailers = grpc_headers.status(code, details)
        trailers = trailers if stream.accepted else (*grpc_headers.CALL_ACCEPTED, *trailers)
        if stream_id in self._held:
            self._held[stream_id].trailers = trailers
        else:
            self._finish(stream_id, trailers)

    def close(self) -> None:
        """Sends GOAWAY. Streams that have not ended are cut off, and held bytes are dropped."""
        if not self._over:
            self._over = True
            self._forget_streams()
            self._h2.close_connection()

    def receive(self, raw: bytes | memoryview) -> list[Event]:
        """Processes received bytes. Raises ConnectionBroken, after which the connection is over. Returns no
        events once it is over."""
        if self._over:
            return []
        try:
            received = self._h2.receive_data(raw)
        except ProtocolError as error:
            self._over = True
            self._forget_streams()
            raise _broken(error) from error
        events: list[Event] = []
        for event in received:
            handle = self._HANDLERS.get(type(event))
            if handle is not None:
                handle(self, event, events)
        # Not before all events are handled: a later one may end the stream.
        if self._held:
            for stream_id in tuple(self._held):
                self._send_held(stream_id)
        if self._unacknowledged >= _ACKNOWLEDGE_BYTES:
            self._acknowledge()
        return events

    def take_outgoing(self) -> bytes:
        """The bytes to write to the socket now. Each is returned once."""
        return self._h2.data_to_send()

    def _settings_received(self, _: h2.events.RemoteSettingsChanged, __: list[Event]) -> None:
        self._handshake_done = True

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
        # A caller's trailers mean nothing; the event that it has ended follows.
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

    def _goaway_received(self, event: h2.events.ConnectionTerminated, events: list[Event]) -> None:
        self._over = True
        details = f"the other end sent GOAWAY: {grpc_headers.error_name(event.error_code)}"
        events.extend(StreamEnded(stream_id, UNAVAILABLE, details) for stream_id in self._streams)
        self._forget_streams()

    def _end_call(self, stream_id: int, code: int, details: str, events: list[Event]) -> None:
        """Client: the other end has sent the status of the call."""
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
        """Server: sends the last headers of a call. RST_STREAM follows, so that a caller that is still
        sending stops."""
        # The other end may have reset the stream in the same bytes, and h2 may have forgotten it already.
        with suppress(StreamClosedError, StreamIDTooLowError):
            self._h2.send_headers(stream_id, headers, end_stream=True)
        self._reset(stream_id, ErrorCodes.NO_ERROR)

    def _reset(self, stream_id: int, error_code: ErrorCodes) -> None:
        with suppress(StreamClosedError):
            self._h2.reset_stream(stream_id, error_code)

    def _send_held(self, stream_id: int) -> None:
        """Sends as much of the held bytes as the window allows."""
        held = self._held[stream_id]
        connection = self._h2
        while held.pieces:
            room = min(connection.local_flow_control_window(stream_id), connection.max_outbound_frame_size)
            if room <= 0:  # negative where a setting shrank the window
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
        """Returns the received bytes to the other end's windows."""
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
        h2.events.ConnectionTerminated: _goaway_received,
    }


def _broken(error: ProtocolError) -> ConnectionBroken:
    return ConnectionBroken(f"{type(error).__name__}: {error}")
