"""The link to one worker: sends each call over the first transport that is open and can carry it.

The grpcio stream is open from the start, which also shows whether the worker is there. When it breaks, its calls
in flight fail at once and the next call opens a new one. The other transports are opened once; one that breaks is given
up, and its calls are sent again over the next one that can carry them. An expert call is pure, so it may be sent twice.
A silent host is silent over every transport: its calls fail, and what was given up is opened again once it answers.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc
from torch import Tensor

from moesaic import rpc
from moesaic.errors import DeadlineExceeded, MoesaicError, Unavailable, from_rpc_error
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2, expert_pb2_grpc
from moesaic.wire.messages import COMPUTE_METHOD, Framed, decode_response, encode_request
from moesaic.wire.tensors import data_of
from router.workers.transports import direct_stream, order
from router.workers.transports.base import (
    GRPC,
    HOST_SILENT,
    Transport,
    TransportKind,
    WorkerAnswer,
    read_answer,
)
from router.workers.transports.grpc_stream import GrpcStream

LATENCIES_KEPT = 1000

# Opens the transports to the worker behind the stub, other than the grpcio stream. May wait for seconds.
OpenTransports = Callable[[expert_pb2_grpc.ExpertServiceStub, Replica], Mapping[TransportKind, Transport]]


@dataclass(slots=True, eq=False)
class Traffic:
    """Counters of one link, and the latencies of its last calls. The engine's thread writes them."""

    calls: int = 0
    rows: int = 0
    failed_calls: int = 0
    # Calls that another replica answered first, because they were late.
    hedged_calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    # The transport of the newest call.
    transport: TransportKind = GRPC
    # The seconds between sending a call and receiving its answer, for the last calls.
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def latency_us(self, quantile: float) -> int:
        """The quantile over the last answered calls, 0 before the first. Any thread may call it."""
        latencies = sorted(self.latencies_s.copy())
        return round(1e6 * latencies[int(quantile * (len(latencies) - 1))]) if latencies else 0


class PendingCall(NamedTuple):
    """A call that was sent. It has no transport if the link was closed before."""

    request: expert_pb2.ComputeRequest
    hidden: Tensor
    kind: TransportKind
    transport: Transport | None
    sent_s: float


class WorkerLink:
    """The transports to one incarnation of a worker. One thread sends and receives; the rest is for any."""

    def __init__(self, replica: Replica, *, open_transports: OpenTransports | None = None) -> None:
        self.replica = replica
        self.traffic = Traffic()
        self._channel = rpc.channel(replica.address)
        self._call_ids = itertools.count(1)
        # Guards opening against closing.
        self._lock = threading.Lock()
        self._closed = False
        self._stream: GrpcStream | None = None
        self._open_transports = open_transports
        # Whether the next answer is the moment to open the other transports.
        self._opens_next = open_transports is not None
        # The open transports other than the grpcio stream. The mapping is replaced as a whole, for readers in
        # other threads: while it is empty by the thread that opens them, from then on by the thread that sends.
        self._others: Mapping[TransportKind, Transport] = {}
        self._open_stream()

    @property
    def lost(self) -> bool:
        """Whether the grpcio stream broke and no call has opened a new one: most likely the worker has ended."""
        stream = self._stream
        return stream is not None and stream.broken

    @property
    def connected(self) -> bool:
        return any(not transport.broken for transport in self._opened())

    @property
    def num_in_flight(self) -> int:
        return sum(transport.num_in_flight for transport in self._opened())

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> PendingCall:
        """Sends a call without waiting and sets its id. `Transport.send` says what `hidden` must be."""
        request.call_id = next(self._call_ids)
        self.traffic.calls += 1
        self.traffic.rows += _num_rows(request)
        return self._send(request, hidden, time.perf_counter())

    def receive(self, call: PendingCall, timeout_s: float) -> WorkerAnswer:
        """Waits for an answer. Raises the error that the worker answered with, DataLoss for a malformed
        answer, Unavailable when the stream broke (with reason HOST_SILENT where the worker may be well), or
        TimeoutError after `timeout_s`; a late answer is then dropped."""
        try:
            answer = self._receive(call, timeout_s)
        except (MoesaicError, TimeoutError):
            self.traffic.failed_calls += 1
            raise
        self.traffic.latencies_s.append(time.perf_counter() - call.sent_s)
        self.traffic.received_bytes += answer.data.nbytes
        self._start_opening()
        return answer

    def wait(self, call: PendingCall, timeout_s: float) -> bool:
        """Whether an answer or an error is there within the time; `receive` then seldom waits."""
        return call.transport is None or call.transport.wait(call.request.call_id, timeout_s)

    def abandon(self, call: PendingCall) -> None:
        """Gives up a call that nobody waits for any more. That is no failure; a late answer is dropped."""
        if call.transport is not None:
            call.transport.abandon(call.request.call_id)

    def take(self, call: PendingCall) -> WorkerAnswer | None:
        """The answer, if it is a right one and has arrived; the call is over in any case, and no failure."""
        try:
            return self._receive(call, 0.0)
        except (MoesaicError, TimeoutError):
            return None

    def probe(
        self,
        request: expert_pb2.ComputeRequest,
        hidden: Tensor,
        timeout_s: float,
        then: Callable[[WorkerAnswer | MoesaicError | TimeoutError], None],
    ) -> None:
        """Sends a call of its own, beside those of the thread that sends, and says in another thread what became of it. Any
        thread may call it."""
        try:
            # One request and one answer are a stream as well.
            method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(COMPUTE_METHOD)
            asked = method.future(encode_request(Framed(request, data_of(hidden))), timeout=timeout_s)
        except ValueError:  # the channel was closed meanwhile
            then(Unavailable("the link to the worker is closed"))
        else:
            asked.add_done_callback(lambda done: then(_outcome(done)))

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for transport in self._opened():
            transport.close()
        self._channel.close()

    def _opened(self) -> Iterator[Transport]:
        stream = self._stream
        if stream is not None:
            yield stream
        yield from self._others.values()

    def _send(self, request: expert_pb2.ComputeRequest, hidden: Tensor, sent_s: float) -> PendingCall:
        kind, transport = self._choose(request, hidden)
        if transport is not None:
            transport.send(request, hidden)
        self.traffic.sent_bytes += hidden.nbytes
        self.traffic.transport = kind
        return PendingCall(request, hidden, kind, transport, sent_s)

    def _choose(
        self, request: expert_pb2.ComputeRequest, hidden: Tensor
    ) -> tuple[TransportKind, Transport | None]:
        """There is no transport when the link is closed."""
        for kind, transport in self._others.items():
            if transport.broken:
                self._give_up(kind)
        others = self._others
        fits_direct = direct_stream.carries(request, hidden, _num_rows(request))
        kind = order.choose(others, fits_direct=fits_direct)
        return kind, self._open_stream() if kind == GRPC else others[kind]

    def _give_up(self, broken: TransportKind) -> None:
        transport = self._others.get(broken)
        if transport is not None:
            self._others = {kind: other for kind, other in self._others.items() if kind != broken}
            transport.close()

    def _open_stream(self) -> GrpcStream | None:
        """The grpcio stream, a new one if it broke; None when the link is closed."""
        with self._lock:
            if self._closed:
                return None
            if self._stream is None or self._stream.broken:
                self._stream = GrpcStream(self._channel)
            return self._stream

    def _receive(self, call: PendingCall, timeout_s: float) -> WorkerAnswer:
        """Sends the call again, while there is time, when a transport other than grpcio breaks."""
        deadline_s = time.monotonic() + timeout_s
        while call.transport is not None:
            try:
                return call.transport.receive(call.request.call_id, deadline_s - time.monotonic())
            except MoesaicError as error:
                if error.reason == HOST_SILENT:
                    self._give_up(call.kind)
                    self._opens_next = not self._others
                    raise
                if call.kind == GRPC or not call.transport.broken or time.monotonic() >= deadline_s:
                    raise
            call = self._send(call.request, call.hidden, call.sent_s)
        raise Unavailable("the link to the worker is closed")

    def _start_opening(self) -> None:
        """Opens the other transports in the background, after the first answer and after a silence."""
        if self._opens_next and self._open_transports is not None:
            self._opens_next = False
            threading.Thread(
                target=self._open_others, args=(self._open_transports,), name="open-transports", daemon=True
            ).start()

    def _open_others(self, open_transports: OpenTransports) -> None:
        try:
            opened = open_transports(expert_pb2_grpc.ExpertServiceStub(self._channel), self.replica)
        except ValueError:  # the channel was closed meanwhile
            return
        with self._lock:
            if not self._closed and not self._others:
                self._others = opened
                return
        for transport in opened.values():
            transport.close()


def _outcome(probe: grpc.Future[bytes]) -> WorkerAnswer | MoesaicError | TimeoutError:
    try:
        answered: bytes | None = probe.result()
        if answered is None:
            return Unavailable("the worker ended the stream")
        return read_answer(decode_response(answered))
    except grpc.FutureCancelledError:
        return Unavailable("the link to the worker is closed")
    except MoesaicError as error:
        failure = error
    except grpc.RpcError as error:
        failure = from_rpc_error(error)
    return TimeoutError() if isinstance(failure, DeadlineExceeded) else failure


def _num_rows(request: expert_pb2.ComputeRequest) -> int:
    """The number of (token, expert) pairs."""
    return sum(len(expert.rows) for expert in request.experts)
