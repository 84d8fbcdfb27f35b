"""One connection to the direct port: its gRPC streams are read and answered on the compute thread.

The thread never waits for a caller: bytes that the socket does not accept at once are kept, within a bound,
until it does. A caller that violates the protocol or does not read its answers is disconnected; its calls are
dropped, and those of other callers continue.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.compute.call_queue import Computed
from expert_worker.serving.call_handler import AcceptedCall, CallHandler, Request, Response
from moesaic.errors import InvalidArgument, MoesaicError, Unavailable, Unsupported
from moesaic.transports.grpc_connection import (
    CallerEnded,
    ConnectionBroken,
    Event,
    GrpcConnection,
    MessageReceived,
    StreamEnded,
    StreamOpened,
)
from moesaic.transports.tcp_socket import MAX_MESSAGE_BYTES
from moesaic.wire import messages as wire

log = logging.getLogger(__name__)

READ_BYTES = 64 << 10
# How much of one caller's input is read before the next pass may start: enough for any call that a router
# sends over the direct stream, and not all of a flood. The time limit stops earlier at many short frames,
# which are slow for their bytes.
MAX_READS = 8
MAX_READ_S = 0.01
# An epoch is bounded because refusals repeat it.
MAX_EPOCH_CHARS = 1024
# The bytes of answers that one caller may leave unread.
MAX_UNSENT_BYTES = 4 * MAX_MESSAGE_BYTES
# The bytes that an answer needs beyond those of its request: timing, and the tags of its fields.
_ANSWER_BYTES = 256


class DirectConnection:
    """The calls of one caller. They are bounded by the batcher's queue, which refuses one more."""

    def __init__(
        self,
        opened: socket.socket,
        handler: CallHandler,
        batcher: Batcher,
        forget: Callable[[DirectConnection], None],
    ) -> None:
        self._socket = opened
        self._handler = handler
        self._batcher = batcher
        self._forget = forget
        self._protocol = GrpcConnection(client=False, max_message_bytes=MAX_MESSAGE_BYTES)
        # By id: the streams on which calls may still arrive or are not answered yet.
        self._streams: dict[int, _Stream] = {}
        self._unsent = bytearray()
        self._awaits_write = False
        self.closed = False

    @property
    def is_used(self) -> bool:
        """Whether the caller has a stream open."""
        return bool(self._streams)

    def is_idle(self) -> bool:
        """Whether every call is answered and every answer given to the socket."""
        streams = list(self._streams.values())
        return not any(stream.in_flight for stream in streams) and not self._num_unsent_bytes()

    def send_preface(self) -> None:
        """Sends the HTTP/2 preface and starts reading."""
        self._batcher.attach(self)
        self._send()

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> None:
        """Reads what has arrived, within a bound. The next poll finds the rest.

        A caller that is gone is noticed behind its last call, before that is computed.
        """
        ends_s = time.monotonic() + MAX_READ_S
        try:
            for _ in range(MAX_READS):
                self._receive(self._socket.recv(READ_BYTES))
                if self.closed or time.monotonic() >= ends_s:
                    return
        except BlockingIOError:  # nothing more to read, or the socket was ready for writing alone
            self._send()
        except ConnectionBroken as error:
            self._cut_off(str(error))
        except OSError:
            self._end()

    def close(self) -> None:
        """Ends all streams, as far as the socket accepts that, and drops their calls."""
        if self.closed:
            return
        try:
            self._send_goaway()
        except Exception:
            # A protocol that has failed before must not prevent other connections from being closed.
            log.exception("a direct connection failed")
        self._end()

    def answer(self, ticket: _DirectTicket, result: Computed | MoesaicError) -> None:
        """Answers a call, unless it was dropped."""
        if ticket not in ticket.stream.in_flight:
            return
        self._settle(ticket, result)
        self._send()

    def _receive(self, raw: bytes) -> None:
        """Raises ConnectionBroken."""
        if not raw:
            self._end()
            return
        for event in self._protocol.receive(raw):
            self._handle(event)
        self._send()
        if self._protocol.is_over:
            self._end()

    def _handle(self, event: Event) -> None:
        match event:
            case StreamOpened(stream_id, method):
                self._open_stream(stream_id, method)
            case MessageReceived(stream_id, data):
                # Messages of a stream that was ended here may still arrive.
                if stream := self._streams.get(stream_id):
                    self._accept_call(stream, data)
            case CallerEnded(stream_id):
                if stream := self._streams.get(stream_id):
                    stream.caller_ended = True
                    self._end_if_done(stream)
            case StreamEnded(stream_id):
                self._drop_stream(stream_id)

    def _open_stream(self, stream_id: int, method: str) -> None:
        if method != wire.COMPUTE_METHOD:
            self._end_stream(stream_id, Unsupported("this port serves Compute only"))
            return
        self._protocol.accept_stream(stream_id)
        self._streams[stream_id] = _Stream(stream_id)

    def _accept_call(self, stream: _Stream, raw: bytes) -> None:
        try:
            request = wire.decode_request(raw)
            if len(request.message.epoch) > MAX_EPOCH_CHARS:
                raise InvalidArgument(f"epoch: longer than {MAX_EPOCH_CHARS} characters", field="epoch")
        except InvalidArgument as error:
            self._end_stream(stream.stream_id, error)
            self._drop_stream(stream.stream_id)
            return
        # The clock of another host cannot say when the call was sent, so its timeout runs from now. The time
        # that it waited in the socket while the thread computed appears only in the caller's own measure of
        # the call.
        accepted = self._handler.accept(request)
        if not isinstance(accepted, AcceptedCall):
            self._respond(stream, accepted)
            return
        ticket = _DirectTicket(self, stream, accepted)
        stream.in_flight.add(ticket)
        try:
            _check_answer_fits(request, accepted.call, len(raw))
            self._batcher.offer(ticket)
        except MoesaicError as error:
            self._settle(ticket, error)

    def _settle(self, ticket: _DirectTicket, result: Computed | MoesaicError) -> None:
        stream = ticket.stream
        stream.in_flight.discard(ticket)
        self._respond(stream, self._handler.answer(ticket.accepted, result))
        self._end_if_done(stream)

    def _respond(self, stream: _Stream, response: Response) -> None:
        self._protocol.send(stream.stream_id, wire.encode_response(response))

    def _end_if_done(self, stream: _Stream) -> None:
        if stream.caller_ended and not stream.in_flight:
            del self._streams[stream.stream_id]
            self._protocol.end_stream(stream.stream_id)

    def _end_stream(self, stream_id: int, error: MoesaicError) -> None:
        self._protocol.end_stream(stream_id, error.code.value[0], error.message)

    def _drop_stream(self, stream_id: int) -> None:
        """Forgets a stream whose answers are no longer wanted, and drops its calls."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        dropped, stream.in_flight = stream.in_flight, set()
        for ticket in dropped:
            self._batcher.withdraw(ticket)
            self._handler.drop(ticket.accepted)

    def _send(self) -> None:
        """Writes what the socket accepts; the poller reports when it accepts the rest."""
        try:
            self._write()
        except OSError:
            self._end()
            return
        if self._num_unsent_bytes() > MAX_UNSENT_BYTES:
            self._cut_off("answers are not read")
        elif self._awaits_write != bool(self._unsent):
            self._awaits_write = bool(self._unsent)
            self._batcher.await_room(self, self._awaits_write)

    def _num_unsent_bytes(self) -> int:
        return len(self._unsent) + self._protocol.num_held_bytes

    def _send_goaway(self) -> None:
        for stream_id in self._streams:
            self._end_stream(stream_id, Unavailable("the worker is draining"))
        self._protocol.close()
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        """Raises OSError when the caller is gone."""
        self._unsent += self._protocol.take_outgoing()
        if self._unsent:
            with suppress(BlockingIOError):
                del self._unsent[: self._socket.send(self._unsent)]

    def _cut_off(self, reason: str) -> None:
        log.warning("a direct connection was cut off", extra={"fields": {"reason": reason}})
        with suppress(OSError):
            self._write()
        self._end()

    def _end(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._batcher.detach(self)
        self._socket.close()
        self._forget(self)
        for stream_id in list(self._streams):
            self._drop_stream(stream_id)


class _Stream:
    """The calls of one stream."""

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self.in_flight: set[_DirectTicket] = set()
        self.caller_ended = False


class _DirectTicket:
    """A call of a direct connection. The thread that computed it writes its answer."""

    def __init__(self, connection: DirectConnection, stream: _Stream, accepted: AcceptedCall) -> None:
        self._connection = connection
        self.stream = stream
        self.accepted = accepted
        self.call = accepted.call
        self.queued_s = accepted.accepted_s

    @property
    def wanted(self) -> bool:
        return self in self.stream.in_flight

    def answer(self, result: Computed | MoesaicError) -> None:
        self._connection.answer(self, result)


def _check_answer_fits(request: Request, call: ExpertCall, num_request_bytes: int) -> None:
    """Raises InvalidArgument when the answer would be too large for this port, before it is computed."""
    data_bytes = request.data.nbytes
    num_rows = len(call.hidden) if call.combine_sum else call.num_rows
    row_bytes = (data_bytes + len(request.message.hidden.scales)) // len(call.hidden)
    # Apart from its rows, an answer repeats less than its request holds apart from them.
    num_bytes = num_rows * row_bytes + num_request_bytes - data_bytes + _ANSWER_BYTES
    if num_bytes > MAX_MESSAGE_BYTES:
        raise InvalidArgument(
            f"hidden: the answer would be larger than the {MAX_MESSAGE_BYTES} bytes that this port carries",
            field="hidden",
            reason="ANSWER_TOO_LARGE",
        )
