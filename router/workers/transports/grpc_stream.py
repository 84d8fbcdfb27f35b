"""One Compute RPC over grpcio as a transport.

grpcio's own threads take requests from a queue and put answers into another, as bytes; the thread that waits
for an answer decodes it. So the threads between the socket and the engine do almost nothing while the engine
needs the interpreter.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import grpc
from torch import Tensor

from moesaic.errors import DataLoss, MoesaicError, Unavailable, from_rpc_error
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import COMPUTE_METHOD, Framed, decode_response, encode_request
from moesaic.wire.tensors import data_of
from router.workers.transports.base import WorkerAnswer, check_call_id, read_answer

_Arrived = Framed[expert_pb2.ComputeResponse]


class GrpcStream:
    """A `Transport` whose RPC starts when it is made."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.broken = False
        # Both are bounded by the calls in flight. None ends the first, the reason of the break ends the
        # second.
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[bytes | MoesaicError] = queue.SimpleQueue()
        # By call id: the answer, the error that replaces it, or None before either.
        self._calls: dict[int, _Arrived | MoesaicError | None] = {}
        self._newest_call = 0
        # Without serialisers, requests and answers are bytes.
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(COMPUTE_METHOD)
        self._answers = call(self._requests())
        threading.Thread(target=self._read, name="worker-link", daemon=True).start()

    @property
    def num_in_flight(self) -> int:
        return len(self._calls)

    def send(self, request: expert_pb2.ComputeRequest, hidden: Tensor) -> None:
        self._calls[request.call_id] = None
        self._newest_call = request.call_id
        self._outbox.put(encode_request(Framed(request, data_of(hidden))))

    def receive(self, call_id: int, timeout_s: float) -> WorkerAnswer:
        deadline_s = time.monotonic() + timeout_s
        try:
            while (arrived := self._calls[call_id]) is None:
                self._sort(self._inbox.get(timeout=max(0.0, deadline_s - time.monotonic())))
        except queue.Empty:
            raise TimeoutError from None
        finally:
            del self._calls[call_id]
        if isinstance(arrived, MoesaicError):
            raise arrived
        return read_answer(arrived)

    def wait(self, call_id: int, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        try:
            while self._calls[call_id] is None:
                self._sort(self._inbox.get(timeout=max(0.0, deadline_s - time.monotonic())))
        except queue.Empty:
            return False
        return True

    def abandon(self, call_id: int) -> None:
        del self._calls[call_id]

    def close(self) -> None:
        self._answers.cancel()

    def _sort(self, arrived: bytes | MoesaicError) -> None:
        """Stores an answer for its call, or drops it if no caller waits; an error fails all calls."""
        if isinstance(arrived, bytes):
            try:
                framed = decode_response(arrived)
                check_call_id(framed.message.call_id, self._newest_call)
            except DataLoss as error:
                # Its call is unknown, and nothing after it on this stream can be trusted.
                self.broken = True
                self._answers.cancel()
                arrived = error
            else:
                if framed.message.call_id in self._calls:
                    self._calls[framed.message.call_id] = framed
                return
        for call_id, before in self._calls.items():
            if before is None:
                self._calls[call_id] = arrived

    def _requests(self) -> Iterator[bytes]:
        while (request := self._outbox.get()) is not None:
            yield request

    def _read(self) -> None:
        error: MoesaicError = Unavailable("the worker ended the stream")
        try:
            for answer in self._answers:
                self._inbox.put(answer)
        except grpc.RpcError as broken:
            # A server that stops without a grace period cancels its calls: the worker is gone.
            if broken.code() is not grpc.StatusCode.CANCELLED:
                error = from_rpc_error(broken)
        finally:
            self.broken = True
            self._outbox.put(None)
            self._inbox.put(error)
