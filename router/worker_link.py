"""One long-lived stream to one worker: many calls in flight, answers paired by call id, late ones dropped.

The engine's thread sends and waits; a reader thread per link hands answers over. A broken stream fails the calls in
flight at once, and the next call opens a new one: an expert call is pure, so it may be sent again anywhere.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import grpc

from moesaic import rpc
from moesaic.errors import MoesaicError, Unavailable, from_rpc_error, from_status
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2, expert_pb2_grpc


@dataclass(slots=True)
class Traffic:
    """Counters of one link since its start."""

    calls: int = 0
    rows: int = 0
    failed_calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A call that was sent."""

    call_id: int
    answer: Future[expert_pb2.ComputeResponse]


class WorkerLink:
    """The stream to one incarnation of a worker."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.traffic = Traffic()
        self._channel = rpc.channel(replica.address)
        self._stub = expert_pb2_grpc.ExpertServiceStub(self._channel)
        self._call_ids = itertools.count(1)
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        stream = self._stream
        return stream is not None and not stream.broken

    @property
    def num_in_flight(self) -> int:
        stream = self._stream
        return 0 if stream is None else len(stream.pending)

    def send(self, request: expert_pb2.ComputeRequest) -> PendingCall:
        """Sends a call without waiting; its id is set here. The answer fails with Unavailable when the stream breaks."""
        request.call_id = next(self._call_ids)
        call = PendingCall(request.call_id, Future())
        with self._lock:
            if self._closed:
                call.answer.set_exception(Unavailable("the link to the worker is closed"))
                return call
            if self._stream is None or self._stream.broken:
                self._stream = _Stream(self._stub)
            self._stream.send(request, call)
        self.traffic.calls += 1
        self.traffic.rows += sum(len(expert.rows) for expert in request.experts)
        self.traffic.sent_bytes += len(request.hidden.data)
        return call

    def receive(self, call: PendingCall, timeout_s: float) -> expert_pb2.ComputeResponse:
        """Waits for an answer. Raises what the worker answered, Unavailable when the stream broke, or TimeoutError
        after `timeout_s`; the late answer is dropped then."""
        try:
            response = call.answer.result(timeout_s)
            if response.HasField("error"):
                raise from_status(response.error)
        except (MoesaicError, TimeoutError):
            self.traffic.failed_calls += 1
            stream = self._stream
            if stream is not None:
                stream.pending.pop(call.call_id, None)
            raise
        self.traffic.received_bytes += len(response.output.data)
        return response

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._stream is not None:
                self._stream.close()
        self._channel.close()


class _Stream:
    """One Compute call of gRPC with its reader thread."""

    def __init__(self, stub: expert_pb2_grpc.ExpertServiceStub) -> None:
        self.broken = False
        self.pending: dict[int, PendingCall] = {}
        # Bounded by the calls in flight: the engine waits for a layer before it sends the next.
        self._outbox: queue.SimpleQueue[expert_pb2.ComputeRequest | None] = queue.SimpleQueue()
        self._responses = stub.Compute(self._requests())
        threading.Thread(target=self._read, name="worker-link", daemon=True).start()

    def send(self, request: expert_pb2.ComputeRequest, call: PendingCall) -> None:
        self.pending[call.call_id] = call
        self._outbox.put(request)
        if self.broken:
            # It broke after the caller looked; the reader may have failed its calls before this one came in.
            self._fail(Unavailable("the stream to the worker broke"))

    def close(self) -> None:
        self._outbox.put(None)
        self._responses.cancel()

    def _requests(self) -> Iterator[expert_pb2.ComputeRequest]:
        while (request := self._outbox.get()) is not None:
            yield request

    def _read(self) -> None:
        error: MoesaicError = Unavailable("the worker ended the stream")
        try:
            for response in self._responses:
                call = self.pending.pop(response.call_id, None)
                if call is not None:
                    call.answer.set_result(response)
        except grpc.RpcError as broken:
            error = from_rpc_error(broken)
        finally:
            self.broken = True
            self._outbox.put(None)
            self._fail(error)

    def _fail(self, error: MoesaicError) -> None:
        for call_id in list(self.pending):
            call = self.pending.pop(call_id, None)
            if call is not None:
                call.answer.set_exception(error)
