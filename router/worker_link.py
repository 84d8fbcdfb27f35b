"""The link to one worker: its calls go over a gRPC stream, or over a same-host lane once that is measured faster.

A stream that broke fails the calls in flight at once, and the next call opens a new one. A lane that broke is given up,
and its calls go again over gRPC: an expert call is pure, so it may be sent twice.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from moesaic import rpc
from moesaic.errors import MoesaicError, Unavailable
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.grpc_stream import GrpcStream
from router.lane_trial import LaneTrial
from router.transport import Answer, Transport

LATENCIES_KEPT = 1000

# Enters the lane to an incarnation of the worker behind a stub; None where there is none. May wait for seconds.
OpenLane = Callable[[expert_pb2_grpc.ExpertServiceStub, str], Transport | None]


@dataclass(slots=True, eq=False)
class Traffic:
    """Counters of one link since its start, and how long its last calls took. Written by the engine's thread."""

    calls: int = 0
    rows: int = 0
    failed_calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    # "grpc" or "lane": the way of the newest call.
    transport: str = "grpc"
    # From sending to the answer.
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def latency_us(self, quantile: float) -> int:
        """Of the last calls that were answered; 0 before the first. For any thread."""
        latencies = sorted(self.latencies_s.copy())
        return round(1e6 * latencies[int(quantile * (len(latencies) - 1))]) if latencies else 0


@dataclass(frozen=True, slots=True, eq=False)
class PendingCall:
    """A call that was sent; without a transport when the link was closed before."""

    request: expert_pb2.ComputeRequest
    hidden: Tensor
    transport: Transport | None
    sent_s: float


class WorkerLink:
    """The way to one incarnation of a worker. One thread sends and receives; the rest is for any."""

    def __init__(self, replica: Replica, *, open_lane: OpenLane | None = None) -> None:
        self.replica = replica
        self.traffic = Traffic()
        self._channel = rpc.channel(replica.address)
        self._call_ids = itertools.count(1)
        # Guards opening against closing.
        self._lock = threading.Lock()
        self._closed = False
        self._stream: GrpcStream | None = None
        # None once it was asked for.
        self._open_lane = open_lane
        self._lane: Transport | None = None
        self._trial = LaneTrial()

    @property
    def connected(self) -> bool:
        stream = self._stream
        return stream is not None and not stream.broken

    @property
    def num_in_flight(self) -> int:
        return sum(way.num_in_flight for way in (self._stream, self._lane) if way is not None)

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> PendingCall:
        """Sends a call without waiting; its id is set here. `hidden` as for `Transport.send`."""
        request.call_id = next(self._call_ids)
        transport = self._choose(request.call_id)
        call = PendingCall(request, hidden, transport, time.perf_counter())
        if transport is not None:
            transport.send(request, hidden)
        self.traffic.calls += 1
        self.traffic.rows += sum(len(expert.rows) for expert in request.experts)
        self.traffic.sent_bytes += hidden.nbytes
        return call

    def receive(self, call: PendingCall, timeout_s: float) -> Answer:
        """Waits for an answer. Raises what the worker answered, DataLoss for a malformed answer, Unavailable when the
        stream broke, or TimeoutError after `timeout_s`; the late answer is dropped then."""
        try:
            answer = self._receive(call, timeout_s)
        except (MoesaicError, TimeoutError):
            self.traffic.failed_calls += 1
            raise
        self.traffic.received_bytes += answer.output.nbytes
        self._enter_lane()
        return answer

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for way in (self._stream, self._lane):
            if way is not None:
                way.close()
        self._channel.close()

    def _choose(self, call_id: int) -> Transport | None:
        lane = self._lane
        over_lane = lane is not None and not lane.broken and self._trial.takes_lane(call_id)
        self.traffic.transport = "lane" if over_lane else "grpc"
        return lane if over_lane else self._open_stream()

    def _open_stream(self) -> GrpcStream | None:
        """The stream, a new one where it broke; None when the link is closed."""
        with self._lock:
            if self._closed:
                return None
            if self._stream is None or self._stream.broken:
                self._stream = GrpcStream(self._channel)
            return self._stream

    def _receive(self, call: PendingCall, timeout_s: float) -> Answer:
        if call.transport is None:
            raise Unavailable("the link to the worker is closed")
        over_lane = call.transport is self._lane
        deadline_s = time.monotonic() + timeout_s
        try:
            answer = call.transport.receive(call.request.call_id, timeout_s)
        except Unavailable:
            stream = self._open_stream() if over_lane and call.transport.broken else None
            if stream is None:
                raise
            stream.send(call.request, call.hidden)
            return stream.receive(call.request.call_id, max(0.0, deadline_s - time.monotonic()))
        self._observe(over_lane, answer.response.timing, time.perf_counter() - call.sent_s)
        return answer

    def _observe(self, over_lane: bool, timing: expert_pb2.ComputeTiming, waited_s: float) -> None:
        self.traffic.latencies_s.append(waited_s)
        if self._lane is not None:
            busy_us = timing.decode_us + timing.queue_us + timing.compute_us + timing.encode_us
            self._trial.observe(over_lane, waited_s - busy_us / 1e6)

    def _enter_lane(self) -> None:
        """After the first answer, in the background: asks for a lane, once."""
        open_lane, self._open_lane = self._open_lane, None
        if open_lane is not None:
            threading.Thread(target=self._take_lane, args=(open_lane,), name="open-lane", daemon=True).start()

    def _take_lane(self, open_lane: OpenLane) -> None:
        try:
            lane = open_lane(expert_pb2_grpc.ExpertServiceStub(self._channel), self.replica.incarnation)
        except ValueError:  # the channel was closed meanwhile
            return
        with self._lock:
            if lane is not None and not self._closed:
                self._lane = lane
                return
        if lane is not None:
            lane.close()
