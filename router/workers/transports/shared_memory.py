"""The router's end of the same-host lane: a transport that writes rows where the worker reads them.

There is no thread behind it: whoever waits for an answer reads the socket, and keeps the answers of others that come by.
A call that nobody waits for any more keeps its buffer until the worker is done with it.
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
from moesaic.transports import shared_memory as lane
from moesaic.transports.shared_memory import Buffer, Frame, LaneError
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed
from moesaic.wire.tensors import data_of
from router.workers.transports.base import Answer, read_answer

# The worker lets callers in between two passes.
CONNECT_TIMEOUT_S = 10.0
# Room behind a call's message for what an answer says beyond it: an error, a scale for every row.
ANSWER_MESSAGE_BYTES = 4096
SCALE_BYTES = 4
SMALLEST_BUFFER_BYTES = 64 << 10

_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT)


def connect(path: str, incarnation: str) -> LaneLink:
    """Enters the lane behind a socket. Raises OSError or LaneError when another one than that worker is there."""
    connection = lane.lane_socket()
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        start_ns = time.monotonic_ns()
        connection.connect(path)
        if not lane.is_ours(connection):
            raise LaneError("the worker runs as another user")
        said, clock_ns = lane.decode_greeting(connection.recv(lane.GREETING_BYTES))
        if said != incarnation:
            raise LaneError("another incarnation of the worker")
        if not start_ns <= clock_ns <= time.monotonic_ns():
            raise LaneError("the worker lives by another clock")
    except BaseException:
        connection.close()
        raise
    return LaneLink(connection)


@dataclass(slots=True, eq=False)
class _Place:
    """A buffer and the call that lies in it."""

    index: int
    buffer: Buffer | None = None
    call_id: int = 0
    # Nobody waits any more.
    abandoned: bool = False
    answer: Frame | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.num_bytes


class LaneLink:
    """A lane that was entered; a `Transport`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._lock = threading.Lock()
        self._free = [_Place(index) for index in reversed(range(lane.MAX_BUFFERS))]
        # By index, those that the worker has.
        self._asked: dict[int, _Place] = {}
        # By call id, those that somebody waits for, and calls that could not be sent.
        self._waiting: dict[int, _Place | MoesaicError] = {}
        # Whose answers were handed out: theirs again with the next call.
        self._lent: list[_Place] = []
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
                self._waiting[request.call_id] = Unavailable("the lane to the worker broke")
            except MoesaicError as error:
                self._waiting[request.call_id] = error

    def receive(self, call_id: int, timeout_s: float) -> Answer:
        """See `Transport`."""
        with self._lock:
            place = self._waiting.pop(call_id)
            if isinstance(place, MoesaicError):
                raise place
            ends_s = time.monotonic() + timeout_s
            try:
                while place.answer is None:
                    self._read(ends_s - time.monotonic())
                return self._answer(place, place.answer)
            except TimeoutError:
                place.abandoned = True
                raise

    def close(self) -> None:
        # Wakes whoever waits, who then lets go of the lock.
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._break()
            self._connection.close()

    def _send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> _Place:
        """Raises OSError when the lane is broken, Overloaded when no buffer is free or can be large enough."""
        if self._broken is not None:
            raise self._broken
        message, data = request.SerializeToString(), data_of(hidden)
        data_offset, num_bytes = _layout(request, len(message), data.nbytes)
        place = self._take_place(num_bytes)
        fd = None
        try:
            if place.num_bytes < num_bytes:
                place.buffer, fd = lane.make_buffer(1 << (num_bytes - 1).bit_length())
            assert place.buffer is not None
            place.call_id, place.answer, place.abandoned = request.call_id, None, False
            frame = Frame(place.index, len(message), data_offset, data.nbytes, time.monotonic_ns())
            place.buffer.bytes[: len(message)] = message
            place.buffer.bytes[data_offset : data_offset + data.nbytes] = data
            lane.send_frame(self._connection, frame, fd)
        finally:
            if fd is not None:
                os.close(fd)
        self._asked[place.index] = place
        return place

    def _take_place(self, num_bytes: int) -> _Place:
        """A free place, of enough bytes if there is one. Raises Overloaded."""
        if num_bytes > lane.MAX_BUFFER_BYTES:
            raise Overloaded("a call is too large for the lane")
        self._free += self._lent
        self._lent.clear()
        # Late answers that nobody came by to read.
        while not self._free and self._readable.poll(0):
            self._read(0.0)
        if not self._free:
            raise Overloaded(f"{lane.MAX_BUFFERS} calls are in flight already")
        # The last one that was used is the one that the caches know.
        for i in reversed(range(len(self._free))):
            if self._free[i].num_bytes >= num_bytes:
                return self._free.pop(i)
        return self._free.pop()

    def _read(self, timeout_s: float) -> None:
        """Takes one answer. Raises TimeoutError when none comes, Unavailable when the lane breaks."""
        if self._broken is not None:
            raise self._broken
        if not self._readable.poll(max(0, math.ceil(1000 * timeout_s))):
            raise TimeoutError
        try:
            frame = lane.decode_frame(self._receive())
            place = self._asked.pop(frame.buffer)
            assert place.buffer is not None
            place.buffer.check(frame)
        except (OSError, LaneError, KeyError) as error:
            self._break()
            raise Unavailable("the lane to the worker broke") from error
        if place.abandoned:
            self._free.append(place)
        else:
            place.answer = frame

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(lane.FRAME_BYTES + 1, _RECEIVE_FLAGS)
        except ConnectionResetError:
            # It ended before it read all calls. What it answered until then is still there.
            return self._connection.recv(lane.FRAME_BYTES + 1, _RECEIVE_FLAGS)

    def _answer(self, place: _Place, frame: Frame) -> Answer:
        """What lies in a place."""
        self._lent.append(place)
        assert place.buffer is not None
        try:
            response = expert_pb2.ComputeResponse.FromString(place.buffer.message(frame))
        except DecodeError as error:
            raise DataLoss("the answer is not a ComputeResponse") from error
        if response.call_id != place.call_id:
            raise DataLoss("the answer is that of another call")
        return read_answer(Framed(response, place.buffer.data(frame)))

    def _break(self) -> None:
        """Fails the calls in flight; answers that have come can still be taken."""
        if self._broken is not None:
            return
        self._broken = Unavailable("the lane to the worker broke")
        for call_id, place in self._waiting.items():
            if isinstance(place, _Place) and place.answer is None:
                self._waiting[call_id] = self._broken
        self._connection.close()


def _layout(request: expert_pb2.ComputeRequest, message_bytes: int, data_bytes: int) -> tuple[int, int]:
    """Where the rows begin, and the bytes of a buffer that holds call and answer, one over the other."""
    num_rows = request.hidden.shape[0]
    if request.combine == expert_pb2.COMBINE_SUM:
        answer_rows = num_rows
    elif num_rows == 1:  # once for every expert
        answer_rows = len(request.experts)
    else:
        answer_rows = sum(len(expert.rows) for expert in request.experts)
    data_offset = lane.align(message_bytes + ANSWER_MESSAGE_BYTES + SCALE_BYTES * answer_rows)
    num_bytes = data_offset + max(data_bytes, answer_rows * (data_bytes // num_rows))
    return data_offset, max(num_bytes, SMALLEST_BUFFER_BYTES)
