"""The worker's end of the shared-memory transport: a socket in a private folder, a connection per router.

All of it runs on the compute thread: a call is read, computed and answered without a hand-over to another
thread. Only processes of the same user are accepted. One that violates the framing is disconnected; its calls
are dropped, and those of other routers continue.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.compute.call_queue import Computed
from expert_worker.serving.call_handler import AcceptedCall, CallHandler, Response
from expert_worker.serving.listener import Listener
from moesaic.errors import MoesaicError
from moesaic.private_folder import PrivateFolder
from moesaic.transports import shared_memory
from moesaic.transports.shared_memory import Buffer, Frame, SharedMemoryError
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed

log = logging.getLogger(__name__)

# One for every router that a cluster may have.
MAX_CONNECTIONS = 64
# How many calls of one router are read before the next pass may start.
MAX_READS = 8
SOCKET_NAME = "rows.sock"
SOCKET_MODE = 0o600


class SharedMemoryServer:
    """The listening socket. `path_for` is empty before `open`, and where no socket could be opened."""

    def __init__(self, handler: CallHandler, *, incarnation: str) -> None:
        self._handler = handler
        self._incarnation = incarnation
        self._host_id = shared_memory.host_id()
        self._folder: PrivateFolder | None = None
        self._path = ""
        self._listener: Listener | None = None
        self._batcher: Batcher
        self._connections: set[SharedMemoryConnection] = set()

    @property
    def num_in_flight(self) -> int:
        """The number of calls that were accepted and are not answered."""
        return sum(connection.num_in_flight for connection in list(self._connections))

    def open(self, batcher: Batcher) -> None:
        """Starts listening; `batcher` reads and computes the calls."""
        if not self._host_id:
            return
        self._batcher = batcher
        try:
            self._listener = Listener(self._listen())
        except OSError:
            # The name of the folder for temporary files is too long, or its file system has no sockets.
            log.warning("no shared memory with routers on this host", exc_info=True)
            self.close()
        else:
            batcher.attach(self)

    def path_for(self, host_id: str, version: int) -> str:
        """The socket for a caller on that host; empty if it cannot use shared memory with this worker."""
        return self._path if (host_id, version) == (self._host_id, shared_memory.VERSION) else ""

    def close(self) -> None:
        """Stops listening and removes the folder. The batcher calls this when it ends; it may be repeated."""
        self._path = ""
        if self._listener is not None:
            self._batcher.detach(self)
            self._listener.close()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def fileno(self) -> int:
        assert self._listener is not None
        return self._listener.fileno()

    def read(self) -> None:
        """Accepts one connection."""
        assert self._listener is not None
        client = self._listener.accept()
        if client is None:
            return
        if len(self._connections) >= MAX_CONNECTIONS or not shared_memory.is_ours(client):
            client.close()
            return
        connection = SharedMemoryConnection(client, self._handler, self._batcher, self._connections.discard)
        self._connections.add(connection)
        connection.send_handshake(self._incarnation)

    def _listen(self) -> socket.socket:
        self._folder = PrivateFolder.create(Path(tempfile.gettempdir()))
        path = self._folder.path / SOCKET_NAME
        listening = shared_memory.frame_socket()
        try:
            listening.bind(str(path))
            path.chmod(SOCKET_MODE)
            listening.listen()
        except OSError:
            listening.close()
            raise
        self._path = str(path)
        return listening


class SharedMemoryConnection:
    """The calls of one router, each in one of that router's buffers."""

    def __init__(
        self,
        connection: socket.socket,
        handler: CallHandler,
        batcher: Batcher,
        forget: Callable[[SharedMemoryConnection], None],
    ) -> None:
        self._connection = connection
        self._handler = handler
        self._batcher = batcher
        self._forget = forget
        self._buffers: dict[int, Buffer] = {}
        # By buffer, which belongs to the worker until the call in it is answered.
        self._in_flight: dict[int, _SharedMemoryTicket] = {}
        self.closed = False

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def send_handshake(self, incarnation: str) -> None:
        """Sends the incarnation and the clock, and starts reading."""
        self._batcher.attach(self)
        handshake = shared_memory.encode_handshake(incarnation, time.monotonic_ns())
        try:
            self._connection.send(handshake, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self.close()

    def fileno(self) -> int:
        return self._connection.fileno()

    def read(self) -> None:
        """Reads the calls that have arrived, within a bound. The next poll finds the others.

        A router that is gone is noticed behind its last call, before that is computed.
        """
        try:
            for _ in range(MAX_READS):
                received = shared_memory.receive_frame(self._connection)
                if received is None:
                    self.close()
                else:
                    self._accept_call(*received)
                if self.closed:
                    return
        except BlockingIOError:
            return
        except SharedMemoryError as error:
            log.warning("a shared-memory connection was cut off", extra={"fields": {"reason": str(error)}})
            self.close()
        except OSError:
            self.close()

    def close(self) -> None:
        """Closes the connection and drops its calls."""
        if self.closed:
            return
        self.closed = True
        self._batcher.detach(self)
        self._connection.close()
        self._forget(self)
        for ticket in list(self._in_flight.values()):
            self._batcher.withdraw(ticket)
            self._handler.drop(ticket.accepted)
        self._in_flight.clear()

    def answer(self, ticket: _SharedMemoryTicket, result: Computed | MoesaicError) -> None:
        """Writes an answer over its call."""
        if self.closed:
            return
        response = self._handler.answer(ticket.accepted, result)
        del self._in_flight[ticket.frame.buffer]
        self._send(ticket.frame, response)

    def _accept_call(self, frame: Frame, fd: int | None) -> None:
        """Raises SharedMemoryError for a frame that our router would not send."""
        buffer = self._buffer(frame, fd)
        try:
            request = expert_pb2.ComputeRequest.FromString(buffer.message(frame))
        except DecodeError as error:
            raise SharedMemoryError("a call that is no message") from error
        sent_s = min(time.monotonic(), frame.sent_ns / 1e9)
        accepted = self._handler.accept(Framed(request, buffer.data(frame)), sent_s)
        if not isinstance(accepted, AcceptedCall):
            self._send(frame, accepted)
            return
        _check_room(buffer, frame, accepted.call)
        # The frame waited in the socket while the thread computed; that time counts as waiting in the queue.
        waited_s = max(0.0, self._batcher.listening_since_s - sent_s)
        ticket = _SharedMemoryTicket(self, frame, accepted, accepted.accepted_s - waited_s)
        self._in_flight[frame.buffer] = ticket
        try:
            self._batcher.offer(ticket)
        except MoesaicError as error:
            self.answer(ticket, error)

    def _buffer(self, frame: Frame, fd: int | None) -> Buffer:
        """The buffer that a frame names; a descriptor makes it a new one."""
        index = frame.buffer
        if fd is not None:
            self._open_buffer(index, fd)
        if index in self._in_flight or index not in self._buffers:
            raise SharedMemoryError("a buffer that is in use, or none")
        buffer = self._buffers[index]
        buffer.check(frame)
        return buffer

    def _open_buffer(self, index: int, fd: int) -> None:
        try:
            if index >= shared_memory.MAX_BUFFERS or index in self._in_flight:
                raise SharedMemoryError("a new buffer in a place that is in use, or none")
            self._buffers[index] = shared_memory.open_buffer(fd)
        finally:
            os.close(fd)

    def _send(self, frame: Frame, response: Response) -> None:
        buffer, data = self._buffers[frame.buffer], response.data
        message = response.message.SerializeToString()
        if len(message) > frame.data_offset:
            log.warning(
                "a shared-memory connection was cut off",
                extra={"fields": {"reason": "no room for an answer's message"}},
            )
            self.close()
            return
        buffer.bytes[: len(message)] = message
        buffer.bytes[frame.data_offset : frame.data_offset + data.nbytes] = data
        answer = Frame(frame.buffer, len(message), frame.data_offset, data.nbytes, time.monotonic_ns())
        try:
            shared_memory.send_frame(self._connection, answer)
        except OSError:
            self.close()


class _SharedMemoryTicket:
    """A call of a connection. Its answer is written where the call was read."""

    def __init__(
        self, connection: SharedMemoryConnection, frame: Frame, accepted: AcceptedCall, queued_s: float
    ) -> None:
        self._connection = connection
        self.frame = frame
        self.accepted = accepted
        self.call = accepted.call
        self.queued_s = queued_s

    @property
    def wanted(self) -> bool:
        return not self._connection.closed

    def answer(self, result: Computed | MoesaicError) -> None:
        self._connection.answer(self, result)


def _check_room(buffer: Buffer, frame: Frame, call: ExpertCall) -> None:
    """Raises SharedMemoryError when the answer's rows would not fit into the buffer."""
    num_sent = call.hidden.shape[0]
    num_rows = num_sent if call.combine_sum else call.num_rows
    if frame.data_offset + num_rows * (frame.data_bytes // num_sent) > buffer.num_bytes:
        raise SharedMemoryError("no room for the answer's rows")
