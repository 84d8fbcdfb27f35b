"""One caller of the direct port: the gRPC streams of its connection, read and answered on the compute thread.

It is never waited for: what its socket does not take at once is kept, within a bound, until it does. A caller that does
not keep to the protocol, or does not read its answers, is cut off; its calls are dropped, all others go on.
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
from expert_worker.serving.call_handler import CallDesk, OpenCall, Request, Response
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
# Of what one caller sent, so much is looked at before the next pass may start: any call of a router's, as it goes this
# way, and not all of a flood. Many short words take long for their bytes: then less of them.
MAX_READS = 8
MAX_READ_S = 0.01
# Refusals repeat it.
MAX_EPOCH_CHARS = 1024
# Answers that one caller may leave unread.
MAX_UNSENT_BYTES = 4 * MAX_MESSAGE_BYTES
# What an answer says beyond what its request said: timing, and the tags of its fields.
_ANSWER_BYTES = 256


class DirectConnection:
    """The calls of one caller. There are never more of them than the batcher's queue holds: one more is refused."""

    def __init__(
        self,
        opened: socket.socket,
        desk: CallDesk,
        batcher: Batcher,
        forget: Callable[[DirectConnection], None],
    ) -> None:
        self._socket = opened
        self._desk = desk
        self._batcher = batcher
        self._forget = forget
        self._protocol = GrpcConnection(client=False, max_message_bytes=MAX_MESSAGE_BYTES)
        # By id, those on which calls may still come or are to be answered.
        self._streams: dict[int, _Stream] = {}
        self._unsent = bytearray()
        self._awaits_room = False
        self.closed = False

    @property
    def is_used(self) -> bool:
        """Whether its caller has a stream open."""
        return bool(self._streams)

    def is_idle(self) -> bool:
        """Whether every call is answered, and every answer on its way."""
        streams = list(self._streams.values())
        return not any(stream.in_flight for stream in streams) and not self._num_unsent_bytes()

    def greet(self) -> None:
        """Says what this end speaks, and listens from now on."""
        self._batcher.attach(self)
        self._send()

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> None:
        """Takes what came, within a bound: when there is more, the next look finds it."""
        ends_s = time.monotonic() + MAX_READ_S
        try:
            for _ in range(MAX_READS):
                raw = self._socket.recv(READ_BYTES)
                self._take(raw)
                if self.closed or len(raw) < READ_BYTES or time.monotonic() >= ends_s:
                    return
        except BlockingIOError:  # it is room to write that there is
            self._send()
        except ConnectionBroken as error:
            self._cut_off(str(error))
        except OSError:
            self._end()

    def close(self) -> None:
        """Ends all streams, as far as the caller still listens, and drops its calls."""
        if self.closed:
            return
        try:
            self._say_goodbye()
        except Exception:  # of a protocol that failed before: it must not keep others from being closed
            log.exception("a direct connection failed")
        self._end()

    def answer(self, ticket: _DirectTicket, result: Computed | MoesaicError) -> None:
        """Answers a call, unless it was dropped."""
        if ticket not in ticket.stream.in_flight:
            return
        self._settle(ticket, result)
        self._send()

    def _take(self, raw: bytes) -> None:
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
                # Of a stream that has been ended here, some may still come.
                if stream := self._streams.get(stream_id):
                    self._take_call(stream, data)
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

    def _take_call(self, stream: _Stream, raw: bytes) -> None:
        try:
            request = wire.decode_request(raw)
            if len(request.message.epoch) > MAX_EPOCH_CHARS:
                raise InvalidArgument(f"epoch: longer than {MAX_EPOCH_CHARS} characters", field="epoch")
        except InvalidArgument as error:
            self._end_stream(stream.stream_id, error)
            self._drop_stream(stream.stream_id)
            return
        # When it was sent is not known, and the clock of another host says nothing here: its time runs from now, and
        # what it waited in the socket while the thread computed shows only in the caller's own measure of the call.
        taken = self._desk.take(request)
        if not isinstance(taken, OpenCall):
            self._respond(stream, taken)
            return
        ticket = _DirectTicket(self, stream, taken)
        stream.in_flight.add(ticket)
        try:
            _check_answer_fits(request, taken.call, len(raw))
            self._batcher.offer(ticket)
        except MoesaicError as error:
            self._settle(ticket, error)

    def _settle(self, ticket: _DirectTicket, result: Computed | MoesaicError) -> None:
        stream = ticket.stream
        stream.in_flight.discard(ticket)
        self._respond(stream, self._desk.answer(ticket.taken, result))
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
        """Nobody waits for its answers."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        dropped, stream.in_flight = stream.in_flight, set()
        for ticket in dropped:
            self._batcher.withdraw(ticket)
            self._desk.drop(ticket.taken)

    def _send(self) -> None:
        """Gives the socket what it takes; for the rest, it says when it has room."""
        try:
            self._write()
        except OSError:
            self._end()
            return
        if self._num_unsent_bytes() > MAX_UNSENT_BYTES:
            self._cut_off("answers are not read")
        elif self._awaits_room != bool(self._unsent):
            self._awaits_room = bool(self._unsent)
            self._batcher.await_room(self, self._awaits_room)

    def _num_unsent_bytes(self) -> int:
        return len(self._unsent) + self._protocol.num_held_bytes

    def _say_goodbye(self) -> None:
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
    """A call of a direct connection: its answer is written by the thread that computed it."""

    def __init__(self, connection: DirectConnection, stream: _Stream, taken: OpenCall) -> None:
        self._connection = connection
        self.stream = stream
        self.taken = taken
        self.call = taken.call
        self.queued_s = taken.taken_s

    @property
    def wanted(self) -> bool:
        return self in self.stream.in_flight

    def answer(self, result: Computed | MoesaicError) -> None:
        self._connection.answer(self, result)


def _check_answer_fits(request: Request, call: ExpertCall, num_request_bytes: int) -> None:
    """Raises InvalidArgument when the answer would be larger than this way carries: better now than after the computing."""
    data_bytes = request.data.nbytes
    num_rows = len(call.hidden) if call.combine_sum else call.num_rows
    row_bytes = (data_bytes + len(request.message.hidden.scales)) // len(call.hidden)
    # Beside its rows an answer repeats less than what its request said beside them.
    num_bytes = num_rows * row_bytes + num_request_bytes - data_bytes + _ANSWER_BYTES
    if num_bytes > MAX_MESSAGE_BYTES:
        raise InvalidArgument(
            f"hidden: the answer would be larger than the {MAX_MESSAGE_BYTES} bytes that this port carries",
            field="hidden",
            reason="ANSWER_TOO_LARGE",
        )
