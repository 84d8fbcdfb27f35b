"""The link to one worker: its calls go over a gRPC stream, or over another way to it once that is measured faster.

A stream that broke fails the calls in flight at once, and the next call opens a new one. Another way that broke is given
up, and its calls go again over the gRPC stream: an expert call is pure, so it may be sent twice.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from moesaic import rpc
from moesaic.errors import MoesaicError, Unavailable
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from router.workers.transports import direct_stream
from router.workers.transports.base import DIRECT, GRPC, Answer, Transport, Way
from router.workers.transports.choice import WayTrial
from router.workers.transports.grpc_stream import GrpcStream

LATENCIES_KEPT = 1000

# Opens what ways there are, beside the stub, to the worker behind it. May wait for seconds.
OpenWays = Callable[[expert_pb2_grpc.ExpertServiceStub, Replica], Mapping[Way, Transport]]


@dataclass(slots=True, eq=False)
class Traffic:
    """Counters of one link since its start, and how long its last calls took. Written by the engine's thread."""

    calls: int = 0
    rows: int = 0
    failed_calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    # The way of the newest call.
    transport: Way = GRPC
    # From sending to the answer.
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def latency_us(self, quantile: float) -> int:
        """Of the last calls that were answered; 0 before the first. For any thread."""
        latencies = sorted(self.latencies_s.copy())
        return round(1e6 * latencies[int(quantile * (len(latencies) - 1))]) if latencies else 0


class PendingCall(NamedTuple):
    """A call that was sent; without a transport when the link was closed before."""

    request: expert_pb2.ComputeRequest
    hidden: Tensor
    way: Way
    transport: Transport | None
    # Where it is noted how long the call waited.
    trial: WayTrial
    sent_s: float


class WorkerLink:
    """The way to one incarnation of a worker. One thread sends and receives; the rest is for any."""

    def __init__(self, replica: Replica, *, open_ways: OpenWays | None = None) -> None:
        self.replica = replica
        self.traffic = Traffic()
        self._channel = rpc.channel(replica.address)
        self._call_ids = itertools.count(1)
        # Guards opening against closing.
        self._lock = threading.Lock()
        self._closed = False
        self._stream: GrpcStream | None = None
        # None once they were asked for.
        self._open_ways = open_ways
        # Those beside the stream, broken ones as well.
        self._ways: Mapping[Way, Transport] = {}
        # What is fastest for small calls need not be for large ones, and those do not go every way.
        self._small_calls, self._large_calls = WayTrial(), WayTrial()

    @property
    def connected(self) -> bool:
        return any(not way.broken for way in self._opened())

    @property
    def num_in_flight(self) -> int:
        return sum(way.num_in_flight for way in self._opened())

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> PendingCall:
        """Sends a call without waiting; its id is set here. `hidden` as for `Transport.send`."""
        request.call_id = next(self._call_ids)
        num_rows = sum(len(expert.rows) for expert in request.experts)
        small = direct_stream.carries(request, hidden, num_rows)
        trial = self._small_calls if small else self._large_calls
        way, transport = self._choose(trial)
        call = PendingCall(request, hidden, way, transport, trial, time.perf_counter())
        if transport is not None:
            transport.send(request, hidden)
        self.traffic.calls += 1
        self.traffic.rows += num_rows
        self.traffic.sent_bytes += hidden.nbytes
        self.traffic.transport = way
        return call

    def receive(self, call: PendingCall, timeout_s: float) -> Answer:
        """Waits for an answer. Raises what the worker answered, DataLoss for a malformed answer, Unavailable when the
        stream broke, or TimeoutError after `timeout_s`; the late answer is dropped then."""
        try:
            answer = self._receive(call, timeout_s)
        except (MoesaicError, TimeoutError):
            self.traffic.failed_calls += 1
            raise
        self.traffic.received_bytes += answer.data.nbytes
        self._look_for_ways()
        return answer

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for way in self._opened():
            way.close()
        self._channel.close()

    def _opened(self) -> Iterator[Transport]:
        stream = self._stream
        if stream is not None:
            yield stream
        yield from self._ways.values()

    def _choose(self, trial: WayTrial) -> tuple[Way, Transport | None]:
        """No transport when the link is closed."""
        while (way := trial.next_way()) != GRPC:
            transport = self._ways[way]
            if not transport.broken:
                return way, transport
            self._give_up(way)
        return GRPC, self._open_stream()

    def _give_up(self, way: Way) -> None:
        for trial in (self._small_calls, self._large_calls):
            trial.give_up(way)
        self._ways[way].close()

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
        deadline_s = time.monotonic() + timeout_s
        try:
            answer = call.transport.receive(call.request.call_id, timeout_s)
        except MoesaicError:
            if call.way == GRPC or not call.transport.broken:
                raise
            self._give_up(call.way)
            stream, left_s = self._open_stream(), deadline_s - time.monotonic()
            if stream is None or left_s <= 0:
                raise
            stream.send(call.request, call.hidden)
            return stream.receive(call.request.call_id, left_s)
        waited_s = time.perf_counter() - call.sent_s
        self.traffic.latencies_s.append(waited_s)
        call.trial.observe(call.way, waited_s - answer.busy_us / 1e6)
        return answer

    def _look_for_ways(self) -> None:
        """After the first answer, in the background, once."""
        open_ways, self._open_ways = self._open_ways, None
        if open_ways is not None:
            threading.Thread(target=self._take_ways, args=(open_ways,), name="open-ways", daemon=True).start()

    def _take_ways(self, open_ways: OpenWays) -> None:
        try:
            ways = open_ways(expert_pb2_grpc.ExpertServiceStub(self._channel), self.replica)
        except ValueError:  # the channel was closed meanwhile
            return
        with self._lock:
            if not self._closed:
                self._ways = ways
                self._small_calls = WayTrial(ways)
                self._large_calls = WayTrial(way for way in ways if way != DIRECT)
                return
        for way in ways.values():
            way.close()
