"""The worker's end of the same-host lane: a door in a private folder, and a lane for every router that came through it.

All of it runs on the compute thread: a call is read, computed and answered without a hand-over. Only processes of the
same user get in, and one that does not keep to the framing is cut off; its calls are dropped, all others go on.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.compute.call_queue import Computed
from expert_worker.serving.call_handler import CallDesk, OpenCall, Response
from expert_worker.serving.listener import Entrance
from moesaic.errors import MoesaicError
from moesaic.transports import shared_memory as lane
from moesaic.transports.shared_memory import Buffer, Frame, LaneError
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed

log = logging.getLogger(__name__)

# One for every router that a cluster may have.
MAX_LANES = 64
SOCKET_NAME = "lane.sock"
SOCKET_MODE = 0o600


class Lanes:
    """The door. Until `open`, and where there can be none, `path_for` is empty."""

    def __init__(self, desk: CallDesk, *, incarnation: str) -> None:
        self._desk = desk
        self._incarnation = incarnation
        self._host_id = lane.host_id()
        self._folder: Path | None = None
        self._path = ""
        self._entrance: Entrance | None = None
        self._batcher: Batcher
        self._lanes: set[Lane] = set()

    @property
    def num_in_flight(self) -> int:
        """Calls that were taken and are not answered."""
        return sum(lane.num_in_flight for lane in list(self._lanes))

    def open(self, batcher: Batcher) -> None:
        """Lets routers in; `batcher` reads and computes their calls."""
        if not self._host_id:
            return
        self._batcher = batcher
        try:
            self._entrance = Entrance(self._listen())
        except OSError:  # the folder for temporary files has too long a name, or knows no sockets
            log.warning("no lane for routers on this host", exc_info=True)
            self.close()
        else:
            batcher.attach(self)

    def path_for(self, host_id: str, lane_version: int) -> str:
        """Where a caller of that host gets in; empty for one that cannot."""
        return self._path if (host_id, lane_version) == (self._host_id, lane.LANE_VERSION) else ""

    def close(self) -> None:
        """Shuts the door and removes the folder. The batcher does it at its end; whoever waits for that may repeat it."""
        self._path = ""
        if self._entrance is not None:
            self._batcher.detach(self)
            self._entrance.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def fileno(self) -> int:
        assert self._entrance is not None
        return self._entrance.fileno()

    def read(self) -> None:
        """Lets one router in."""
        assert self._entrance is not None
        connection = self._entrance.accept()
        if connection is None:
            return
        if len(self._lanes) >= MAX_LANES or not lane.is_ours(connection):
            connection.close()
            return
        made = Lane(connection, self._desk, self._batcher, self._lanes.discard)
        self._lanes.add(made)
        made.greet(self._incarnation)

    def _listen(self) -> socket.socket:
        # Only this user may enter the folder: mkdtemp sees to it.
        self._folder = Path(tempfile.mkdtemp(prefix="moesaic-"))
        path = self._folder / SOCKET_NAME
        door = lane.lane_socket()
        try:
            door.bind(str(path))
            path.chmod(SOCKET_MODE)
            door.listen()
        except OSError:
            door.close()
            raise
        self._path = str(path)
        return door


class Lane:
    """The calls of one router, each in a buffer of that router's."""

    def __init__(
        self,
        connection: socket.socket,
        desk: CallDesk,
        batcher: Batcher,
        forget: Callable[[Lane], None],
    ) -> None:
        self._connection = connection
        self._desk = desk
        self._batcher = batcher
        self._forget = forget
        self._buffers: dict[int, Buffer] = {}
        # By buffer: what lies in it is the caller's again only after the answer.
        self._in_flight: dict[int, _LaneTicket] = {}
        self.closed = False

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def greet(self, incarnation: str) -> None:
        """Says who is here, and listens from now on."""
        self._batcher.attach(self)
        greeting = lane.encode_greeting(incarnation, time.monotonic_ns())
        try:
            self._connection.send(greeting, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self.close()

    def fileno(self) -> int:
        return self._connection.fileno()

    def read(self) -> None:
        """Takes one call: when more are there, the next look finds them."""
        try:
            received = lane.receive_frame(self._connection)
            if received is None:
                self.close()
            else:
                self._take(*received)
        except BlockingIOError:
            return
        except LaneError as error:
            log.warning("a lane was cut off", extra={"fields": {"reason": str(error)}})
            self.close()
        except OSError:
            self.close()

    def close(self) -> None:
        """Ends the lane and drops its calls."""
        if self.closed:
            return
        self.closed = True
        self._batcher.detach(self)
        self._connection.close()
        self._forget(self)
        for ticket in list(self._in_flight.values()):
            self._batcher.withdraw(ticket)
            self._desk.drop(ticket.taken)
        self._in_flight.clear()

    def answer(self, ticket: _LaneTicket, result: Computed | MoesaicError) -> None:
        """Writes an answer over its call."""
        if self.closed:
            return
        response = self._desk.answer(ticket.taken, result)
        del self._in_flight[ticket.frame.buffer]
        self._send(ticket.frame, response)

    def _take(self, frame: Frame, fd: int | None) -> None:
        """Raises LaneError for a frame that a router of ours would not send."""
        buffer = self._buffer(frame, fd)
        try:
            request = expert_pb2.ComputeRequest.FromString(buffer.message(frame))
        except DecodeError as error:
            raise LaneError("a call that is no message") from error
        sent_s = min(time.monotonic(), frame.sent_ns / 1e9)
        taken = self._desk.take(Framed(request, buffer.data(frame)), sent_s)
        if not isinstance(taken, OpenCall):
            self._send(frame, taken)
            return
        _check_room(buffer, frame, taken.call)
        # While the thread computed, the frame waited in the socket as others do in the queue.
        waited_s = max(0.0, self._batcher.listening_since_s - sent_s)
        ticket = _LaneTicket(self, frame, taken, taken.taken_s - waited_s)
        self._in_flight[frame.buffer] = ticket
        try:
            self._batcher.offer(ticket)
        except MoesaicError as error:
            self.answer(ticket, error)

    def _buffer(self, frame: Frame, fd: int | None) -> Buffer:
        """The buffer that a frame names; with a descriptor it is a new one."""
        index = frame.buffer
        if fd is not None:
            self._open_buffer(index, fd)
        if index in self._in_flight or index not in self._buffers:
            raise LaneError("a buffer that is in use, or none")
        buffer = self._buffers[index]
        buffer.check(frame)
        return buffer

    def _open_buffer(self, index: int, fd: int) -> None:
        try:
            if index >= lane.MAX_BUFFERS or index in self._in_flight:
                raise LaneError("a new buffer in a place that is in use, or none")
            self._buffers[index] = lane.open_buffer(fd)
        finally:
            os.close(fd)

    def _send(self, frame: Frame, response: Response) -> None:
        buffer, data = self._buffers[frame.buffer], response.data
        message = response.message.SerializeToString()
        if len(message) > frame.data_offset:
            log.warning("a lane was cut off", extra={"fields": {"reason": "no room for an answer's message"}})
            self.close()
            return
        buffer.bytes[: len(message)] = message
        buffer.bytes[frame.data_offset : frame.data_offset + data.nbytes] = data
        answer = Frame(frame.buffer, len(message), frame.data_offset, data.nbytes, time.monotonic_ns())
        try:
            lane.send_frame(self._connection, answer)
        except OSError:
            self.close()


class _LaneTicket:
    """A call of a lane: its answer is written where it was read."""

    def __init__(self, lane: Lane, frame: Frame, taken: OpenCall, queued_s: float) -> None:
        self._lane = lane
        self.frame = frame
        self.taken = taken
        self.call = taken.call
        self.queued_s = queued_s

    @property
    def wanted(self) -> bool:
        return not self._lane.closed

    def answer(self, result: Computed | MoesaicError) -> None:
        self._lane.answer(self, result)


def _check_room(buffer: Buffer, frame: Frame, call: ExpertCall) -> None:
    """Raises LaneError when the answer would not fit where the rows are."""
    num_sent = call.hidden.shape[0]
    num_rows = num_sent if call.combine_sum else call.num_rows
    if frame.data_offset + num_rows * (frame.data_bytes // num_sent) > buffer.num_bytes:
        raise LaneError("no room for the answer's rows")
