"""The router's end of the direct stream: gRPC on the wire, sent, polled and read by the engine's own thread.

There is no background thread: the caller that waits for an answer reads the socket and stores the answers to
other calls that arrive meanwhile. Bytes that the socket does not accept at once are written while a caller
waits, or with the next call, so a send never blocks.
"""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from contextlib import suppress

from google.rpc import status_pb2
from torch import Tensor

from moesaic.addresses import join_address, split_address
from moesaic.errors import Cancelled, DataLoss, MoesaicError, Overloaded, Unavailable, from_status
from moesaic.transports import tcp_socket
from moesaic.transports.grpc_connection import ConnectionBroken, GrpcConnection, MessageReceived, StreamEnded
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import COMPUTE_METHOD, Framed, decode_response, encode_request
from moesaic.wire.tensors import data_of
from router.workers.transports.base import HOST_SILENT, WorkerAnswer, check_call_id, read_answer

# Calls in flight, including those whose caller no longer waits.
MAX_CALLS = 16
# The rows of the largest call, and of the largest answer, that the direct stream carries. With larger ones
# the engine waits for the socket, which grpcio's threads do for it: the round trip of 256 KiB takes 0.44 ms
# (0.73 over grpcio), that of 512 KiB 1.7 (0.98).
MAX_ROWS_BYTES = 256 << 10
# The limit for each of two steps: the TCP connection, and the worker's HTTP/2 preface, which it sends between
# two passes.
CONNECT_TIMEOUT_S = 10.0

_READ_BYTES = 256 << 10
# An answer that has already arrived is still read after the deadline; reading the bytes before it takes no
# longer.
_OVERTIME_S = 0.1
# Beyond the calls in flight there are only the protocol's own frames.
_MAX_UNSENT_BYTES = MAX_CALLS * tcp_socket.MAX_MESSAGE_BYTES

_Arrived = Framed[expert_pb2.ComputeResponse]


def carries(request: expert_pb2.ComputeRequest, hidden: Tensor, num_rows: int) -> bool:
    """Whether a call of `num_rows` (token, expert) pairs and its answer fit the direct stream."""
    num_bytes = hidden.nbytes
    if request.combine != expert_pb2.COMBINE_SUM:
        num_bytes = max(num_bytes, num_rows * num_bytes // hidden.size(0))
    return num_bytes <= MAX_ROWS_BYTES


def connect(address: str, port: int) -> DirectStream:
    """The direct stream to `port` of the host in `address`, HOST:PORT. Raises OSError (including
    TimeoutError) where nothing answers, Unavailable where the other end does not speak HTTP/2."""
    host, _ = split_address(address)
    connection = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
    try:
        tcp_socket.prepare_socket(connection)
        stream = DirectStream(connection, join_address(host, port))
        # A port that accepts connections and never answers would cost a call its whole timeout.
        stream.handshake(CONNECT_TIMEOUT_S)
    except BaseException:
        connection.close()
        raise
    return stream


class DirectStream:
    """A `Transport` over one Compute RPC. The lock is held while a thread sends, and while one waits."""

    def __init__(self, connection: socket.socket, authority: str) -> None:
        """Takes a connected socket that does not block."""
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._lock = threading.Lock()
        self._connection = GrpcConnection(client=True, max_message_bytes=tcp_socket.MAX_MESSAGE_BYTES)
        self._stream_id = self._connection.open_stream(COMPUTE_METHOD, authority)
        # The bytes that the socket has not accepted yet, bounded by the calls in flight.
        self._unsent = memoryview(b"")
        self._read_into = memoryview(bytearray(_READ_BYTES))
        # By call id: the answer, the error that replaces it, or None before either.
        self._calls: dict[int, _Arrived | MoesaicError | None] = {}
        # The ids of calls that were sent and that no caller waits for any more.
        self._abandoned: set[int] = set()
        self._newest_call = 0
        self._broken: MoesaicError | None = None

    @property
    def broken(self) -> bool:
        return self._broken is not None

    @property
    def num_in_flight(self) -> int:
        return len(self._calls)

    def handshake(self, timeout_s: float) -> None:
        """Exchanges the HTTP/2 prefaces. Raises Unavailable where the other end closes or does not speak
        HTTP/2, or TimeoutError."""
        ends_s = time.monotonic() + timeout_s
        with self._lock:
            self._write()
            while not self._connection.handshake_done:
                self._advance(ends_s)

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> None:
        """See `Transport`. More than `MAX_CALLS` at once are Overloaded."""
        message = encode_request(Framed(request, data_of(hidden)))
        with self._lock:
            try:
                self._send(message)
                self._calls[request.call_id] = None
                self._newest_call = request.call_id
            except MoesaicError as error:
                self._calls[request.call_id] = error

    def receive(self, call_id: int, timeout_s: float) -> WorkerAnswer:
        """See `Transport`."""
        with self._lock:
            ends_s = time.monotonic() + timeout_s
            try:
                while (arrived := self._calls[call_id]) is None:
                    self._advance(ends_s)
            except TimeoutError:
                self._abandoned.add(call_id)
                raise
            finally:
                del self._calls[call_id]
        if isinstance(arrived, MoesaicError):
            raise arrived
        return read_answer(arrived)

    def wait(self, call_id: int, timeout_s: float) -> bool:
        """See `Transport`."""
        with self._lock:
            ends_s = time.monotonic() + timeout_s
            try:
                while self._calls[call_id] is None:
                    self._advance(ends_s)
            except TimeoutError:
                return False
            except MoesaicError:  # the stream broke: all its calls have failed
                return True
        return True

    def abandon(self, call_id: int) -> None:
        """See `Transport`."""
        with self._lock:
            if self._calls.pop(call_id) is None:
                self._abandoned.add(call_id)

    def close(self) -> None:
        # Wakes the thread that waits, which then releases the lock.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        with self._lock:
            self._break(Unavailable("the direct stream to the worker is closed"))

    def _send(self, message: bytes) -> None:
        """Raises the error that prevents sending."""
        if self._broken is not None:
            raise self._broken
        if len(message) > tcp_socket.MAX_MESSAGE_BYTES:
            raise Overloaded("a call is too large for the direct stream")
        # Late answers may be waiting unread in the socket.
        while self._is_full() and self._read():
            pass
        if self._is_full():
            raise Overloaded(f"{MAX_CALLS} calls are in flight already")
        self._connection.send(self._stream_id, message)
        self._write()

    def _is_full(self) -> bool:
        return len(self._calls) + len(self._abandoned) >= MAX_CALLS

    def _advance(self, ends_s: float) -> None:
        """Reads what has arrived, or waits for it. Raises TimeoutError, even if bytes keep arriving."""
        if not self._read():
            self._wait(ends_s)
        elif time.monotonic() > ends_s + _OVERTIME_S:
            raise TimeoutError

    def _read(self) -> bool:
        """Reads what has arrived; False if nothing has. Raises the reason when the stream is broken."""
        if self._broken is not None:
            raise self._broken
        try:
            num_bytes = self._socket.recv_into(self._read_into)
            if not num_bytes:
                raise ConnectionResetError
            events = self._connection.receive(self._read_into[:num_bytes])
        except BlockingIOError:
            return False
        except (OSError, ConnectionBroken) as error:
            raise self._break(_broke(error, self._socket)) from error
        for event in events:
            if isinstance(event, MessageReceived):
                self._sort(event.data)
            elif isinstance(event, StreamEnded):
                self._break(_reason(event))
        if self._broken is None:
            self._write()
        return True

    def _wait(self, ends_s: float) -> None:
        """Waits until there are bytes to read, or room for unsent ones, which are then sent. Raises
        TimeoutError."""
        wanted = select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN
        self._poll.modify(self._socket, wanted)
        if not self._poll.poll(max(0, math.ceil(1000 * (ends_s - time.monotonic())))):
            raise TimeoutError
        if self._unsent:
            self._write()

    def _write(self) -> None:
        """Sends as much as the socket accepts. Raises the reason when the stream breaks."""
        if fresh := self._connection.take_outgoing():
            self._unsent = memoryview(b"".join((self._unsent, fresh)) if self._unsent else fresh)
        if not self._unsent:
            return
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > _MAX_UNSENT_BYTES:
                raise self._break(Unavailable("the worker does not read what it asks for")) from None
        except OSError as error:
            raise self._break(_broke(error, self._socket)) from error

    def _sort(self, message: bytes) -> None:
        """Stores an answer for its call, or drops it if no caller waits. Raises DataLoss for anything else."""
        try:
            framed = decode_response(message)
            check_call_id(framed.message.call_id, self._newest_call)
        except DataLoss as error:
            # Its call is unknown, and nothing after it on this stream can be trusted.
            self._break(error)
            raise
        call_id = framed.message.call_id
        if call_id in self._calls:
            self._calls[call_id] = framed
        else:
            self._abandoned.discard(call_id)

    def _break(self, error: MoesaicError) -> MoesaicError:
        """Fails the calls in flight, the first time; answers that have arrived can still be received. Returns
        the reason of the first time."""
        if self._broken is not None:
            return self._broken
        self._broken = error
        for call_id, arrived in self._calls.items():
            if arrived is None:
                self._calls[call_id] = error
        self._connection.close()
        with suppress(OSError):
            self._socket.send(b"".join((self._unsent, self._connection.take_outgoing())))
        self._socket.close()
        return error


def _broke(error: Exception, connection: socket.socket) -> MoesaicError:
    if isinstance(error, OSError) and tcp_socket.is_silence(error, connection):
        return Unavailable("the worker's host is silent", reason=HOST_SILENT)
    return Unavailable("the direct stream to the worker broke")


def _reason(end: StreamEnded) -> MoesaicError:
    """A stream that ends, even with OK, is an error for its calls. A server that stops without a grace period
    cancels its calls, which means here that the worker is gone."""
    error = from_status(status_pb2.Status(code=end.code, message=end.details))
    return (
        Unavailable("the worker ended the stream") if not end.code or isinstance(error, Cancelled) else error
    )
