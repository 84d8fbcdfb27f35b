"""The router's end of the shared-memory transport: rows are written where the worker reads them.

There is no background thread: the caller that waits for an answer reads the socket and stores the answers to
other calls that arrive meanwhile. A call whose caller no longer waits keeps its buffer until the worker has
answered it.
"""

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from torch import Tensor

from moesaic.errors import DataLoss, MoesaicError, Overloaded, Unavailable
from moesaic.transports import shared_memory
from moesaic.transports.shared_memory import Buffer, Frame, SharedMemoryError
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed
from moesaic.wire.tensors import data_of
from router.workers.transports.base import WorkerAnswer, read_answer

# The worker accepts connections between two passes.
CONNECT_TIMEOUT_S = 10.0
# Room after a call's message for the fields that only an answer has: an error, and a scale for every row.
ANSWER_MESSAGE_BYTES = 4096
SCALE_BYTES = 4
SMALLEST_BUFFER_BYTES = 64 << 10

_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT)


def connect(path: str, incarnation: str) -> SharedMemoryTransport:
    """Connects to a worker's socket. Raises OSError, or SharedMemoryError when it is not that incarnation of
    the worker."""
    connection = shared_memory.frame_socket()
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        start_ns = time.monotonic_ns()
        connection.connect(path)
        if not shared_memory.is_ours(connection):
            raise SharedMemoryError("the worker runs as another user")
        answered, clock_ns = shared_memory.decode_handshake(connection.recv(shared_memory.HANDSHAKE_BYTES))
        if answered != incarnation:
            raise SharedMemoryError("another incarnation of the worker")
        if not start_ns <= clock_ns <= time.monotonic_ns():
            raise SharedMemoryError("the worker has another clock")
    except BaseException:
        connection.close()
        raise
    return SharedMemoryTransport(connection)


@dataclass(slots=True, eq=False)
class _CallBuffer:
    """A buffer and the call in it."""

    index: int
    memory: Buffer | None = None
    call_id: int = 0
    # Whether the caller no longer waits.
    abandoned: bool = False
    answer: Frame | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self.memory is None else self.memory.num_bytes


class SharedMemoryTransport:
    """A `Transport` over one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._lock = threading.Lock()
        self._free = [_CallBuffer(index) for index in reversed(range(shared_memory.MAX_BUFFERS))]
        # By index: the buffers of calls that the worker has not answered.
        self._with_worker: dict[int, _CallBuffer] = {}
        # By call id: the buffers of calls whose caller waits, and the errors of calls that could not be sent.
        self._waiting: dict[int, _CallBuffer | MoesaicError] = {}
        # Buffers whose answers the caller may still read; they are free again with the next call.
        self._lent: list[_CallBuffer] = []
        self._broken: MoesaicError | None = None

    @property
    def broken(self) -> bool:
        return self._broken is not None

    @property
    def num_in_flight(self) -> int:
        return len(self._waiting)

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> None:
        """See `Transport`. More than `MAX_BUFFERS` calls at once are Overloaded."""
        with self._lock:
            try:
                self._waiting[request.call_id] = self._send(request, hidden)
            except OSError:
                self._break()
                self._waiting[request.call_id] = Unavailable("the shared memory with the worker broke")
            except MoesaicError as error:
                self._waiting[request.call_id] = error

    def receive(self, call_id: int, timeout_s: float) -> WorkerAnswer:
        """See `Transport`."""
        with self._lock:
            held = self._waiting.pop(call_id)
            if isinstance(held, MoesaicError):
                raise held
            ends_s = time.monotonic() + timeout_s
            try:
                while held.answer is None:
                    self._read(ends_s - time.monotonic())
                return self._answer(held, held.answer)
            except TimeoutError:
                self._release(held)
                raise

    def wait(self, call_id: int, timeout_s: float) -> bool:
        """See `Transport`."""
        with self._lock:
            held = self._waiting[call_id]
            if isinstance(held, MoesaicError):
                return True
            ends_s = time.monotonic() + timeout_s
            try:
                while held.answer is None:
                    self._read(ends_s - time.monotonic())
            except TimeoutError:
                return False
            except MoesaicError:  # the connection broke: all its calls have failed
                return True
        return True

    def abandon(self, call_id: int) -> None:
        """See `Transport`."""
        with self._lock:
            held = self._waiting.pop(call_id)
            if isinstance(held, _CallBuffer):
                self._release(held)

    def close(self) -> None:
        # Wakes the thread that waits, which then releases the lock.
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._break()
            self._connection.close()

    def _send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> _CallBuffer:
        """Raises OSError when the connection is broken, Overloaded when no buffer is free or can be large
        enough."""
        if self._broken is not None:
            raise self._broken
        message, data = request.SerializeToString(), data_of(hidden)
        data_offset, num_bytes = _layout(request, len(message), data.nbytes)
        held = self._acquire(num_bytes)
        fd = None
        try:
            if held.num_bytes < num_bytes:
                held.memory, fd = shared_memory.make_buffer(1 << (num_bytes - 1).bit_length())
            assert held.memory is not None
            held.call_id, held.answer, held.abandoned = request.call_id, None, False
            frame = Frame(held.index, len(message), data_offset, data.nbytes, time.monotonic_ns())
            held.memory.bytes[: len(message)] = message
            held.memory.bytes[data_offset : data_offset + data.nbytes] = data
            shared_memory.send_frame(self._connection, frame, fd)
        finally:
            if fd is not None:
                os.close(fd)
        self._with_worker[held.index] = held
        return held

    def _release(self, held: _CallBuffer) -> None:
        """The buffer of a call that nobody waits for is free when the worker has answered."""
        if held.answer is None:
            held.abandoned = True
        else:
            self._lent.append(held)

    def _acquire(self, num_bytes: int) -> _CallBuffer:
        """A free buffer, one that is large enough if there is one. Raises Overloaded."""
        if num_bytes > shared_memory.MAX_BUFFER_BYTES:
            raise Overloaded("a call is too large for shared memory")
        self._free += self._lent
        self._lent.clear()
        # Late answers may be waiting unread in the socket.
        while not self._free and self._readable.poll(0):
            self._read(0.0)
        if not self._free:
            raise Overloaded(f"{shared_memory.MAX_BUFFERS} calls are in flight already")
        # The buffer that was used last is the one still in the CPU caches.
        for i in reversed(range(len(self._free))):
            if self._free[i].num_bytes >= num_bytes:
                return self._free.pop(i)
        return self._free.pop()

    def _read(self, timeout_s: float) -> None:
        """Reads one answer. Raises TimeoutError when none arrives, Unavailable when the connection breaks."""
        if self._broken is not None:
            raise self._broken
        if not self._readable.poll(max(0, math.ceil(1000 * timeout_s))):
            raise TimeoutError
        try:
            frame = shared_memory.decode_frame(self._receive())
            held = self._with_worker.pop(frame.buffer)
            assert held.memory is not None
            held.memory.check(frame)
        except (OSError, SharedMemoryError, KeyError) as error:
            self._break()
            raise Unavailable("the shared memory with the worker broke") from error
        if held.abandoned:
            self._free.append(held)
        else:
            held.answer = frame

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(shared_memory.FRAME_BYTES + 1, _RECEIVE_FLAGS)
        except ConnectionResetError:
            # The worker closed before it had read all calls. The answers that it sent until then can still be
            # read.
            return self._connection.recv(shared_memory.FRAME_BYTES + 1, _RECEIVE_FLAGS)

    def _answer(self, held: _CallBuffer, frame: Frame) -> WorkerAnswer:
        """The answer in a buffer."""
        self._lent.append(held)
        assert held.memory is not None
        try:
            response = expert_pb2.ComputeResponse.FromString(held.memory.message(frame))
        except DecodeError as error:
            raise DataLoss("the answer is not a ComputeResponse") from error
        if response.call_id != held.call_id:
            raise DataLoss("the answer is that of another call")
        return read_answer(Framed(response, held.memory.data(frame)))

    def _break(self) -> None:
        """Fails the calls in flight; answers that have arrived can still be received."""
        if self._broken is not None:
            return
        self._broken = Unavailable("the shared memory with the worker broke")
        for call_id, held in self._waiting.items():
            if isinstance(held, _CallBuffer) and held.answer is None:
                self._waiting[call_id] = self._broken
        self._connection.close()


def _layout(request: expert_pb2.ComputeRequest, message_bytes: int, data_bytes: int) -> tuple[int, int]:
    """Where the rows begin, and the size of a buffer that can hold the call and, written over it, the
    answer."""
    num_rows = request.hidden.shape[0]
    if request.combine == expert_pb2.COMBINE_SUM:
        answer_rows = num_rows
    elif num_rows == 1:  # one row for every expert
        answer_rows = len(request.experts)
    else:
        answer_rows = sum(len(expert.rows) for expert in request.experts)
    data_offset = shared_memory.align(message_bytes + ANSWER_MESSAGE_BYTES + SCALE_BYTES * answer_rows)
    num_bytes = data_offset + max(data_bytes, answer_rows * (data_bytes // num_rows))
    return data_offset, max(num_bytes, SMALLEST_BUFFER_BYTES)
