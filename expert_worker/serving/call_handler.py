"""Validates calls and makes their answers, alike for every transport: read, check, count, trace.

A handler belongs to one transport and to the one thread that serves it, so its counters need no lock.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from opentelemetry import trace

from expert_worker.compute.call import ExpertCall, read_call
from expert_worker.compute.call_queue import Computed
from expert_worker.experts.store import ExpertStore
from moesaic import telemetry
from moesaic.errors import InternalError, MoesaicError, Unavailable, to_status
from moesaic.families import MoeModel
from moesaic.v1 import expert_pb2
from moesaic.wire.messages import Framed
from moesaic.wire.tensors import data_of, encode_rows

log = logging.getLogger(__name__)

RETRY_AFTER_S = 0.5

Request = Framed[expert_pb2.ComputeRequest]
Response = Framed[expert_pb2.ComputeResponse]

_NOTHING = memoryview(b"")


class AcceptedCall(NamedTuple):
    """A call that was accepted and is not answered yet."""

    request: expert_pb2.ComputeRequest
    call: ExpertCall
    span: trace.Span
    decode_s: float
    # When decoding ended and the wait for a pass began.
    accepted_s: float


class CallHandler:
    """Refuses all calls as Unavailable before `open` and after `close`."""

    def __init__(self, *, worker: str, max_call_rows: int) -> None:
        self.worker = worker
        self._max_call_rows = max_call_rows
        self._model: MoeModel | None = None
        self._store: ExpertStore | None = None
        self._closed = False
        self.calls = self.rows = self.refused_calls = 0

    def open(self, model: MoeModel, store: ExpertStore) -> None:
        self._model, self._store = model, store

    def close(self) -> None:
        self._closed = True

    def accept(self, framed: Request, sent_s: float | None = None) -> AcceptedCall | Response:
        """The call in a message, or its refusal; never raises. The caller's timeout runs from `sent_s` if
        that is known, else from now."""
        request = framed.message
        span = self._start_span(request) if request.traceparent else trace.INVALID_SPAN
        start_s = time.monotonic()
        try:
            call = self._read(framed, start_s if sent_s is None else sent_s)
        except MoesaicError as error:
            return self._refuse(request, span, error)
        except Exception:
            log.exception("a call failed", extra={"fields": {"layer": request.layer}})
            return self._refuse(request, span, InternalError("internal error"))
        accepted_s = time.monotonic()
        return AcceptedCall(request, call, span, accepted_s - start_s, accepted_s)

    def answer(self, accepted: AcceptedCall, result: Computed | MoesaicError) -> Response:
        """The answer to an accepted call. Called once for each."""
        request = accepted.request
        if isinstance(result, MoesaicError):
            return self._refuse(request, accepted.span, result)
        header, rows = encode_rows(result.output, request.hidden.dtype)
        self.calls += 1
        self.rows += accepted.call.num_rows
        accepted.span.end()
        response = expert_pb2.ComputeResponse(
            call_id=request.call_id,
            epoch=request.epoch,
            versions=[group.version for group in request.experts],
            output=header,
        )
        timing = response.timing
        timing.decode_us = _us(accepted.decode_s)
        timing.queue_us = _us(result.queue_s)
        timing.compute_us = _us(result.compute_s)
        timing.encode_us = _us(time.monotonic() - result.ended_s)
        return Framed(response, data_of(rows))

    def drop(self, accepted: AcceptedCall) -> None:
        """Ends a call whose caller is gone."""
        accepted.span.end()

    def _read(self, framed: Request, sent_s: float) -> ExpertCall:
        if self._closed:
            raise Unavailable("the worker is draining", retry_after_s=RETRY_AFTER_S)
        if self._model is None or self._store is None:
            raise Unavailable("the worker is loading", retry_after_s=RETRY_AFTER_S)
        return read_call(
            framed, model=self._model, store=self._store, max_rows=self._max_call_rows, now_s=sent_s
        )

    def _refuse(self, request: expert_pb2.ComputeRequest, span: trace.Span, error: MoesaicError) -> Response:
        self.refused_calls += 1
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)
        span.end()
        response = expert_pb2.ComputeResponse(
            call_id=request.call_id, epoch=request.epoch, error=to_status(error)
        )
        return Framed(response, _NOTHING)

    def _start_span(self, request: expert_pb2.ComputeRequest) -> trace.Span:
        """A child of the caller's span."""
        return telemetry.TRACER.start_span(
            telemetry.SPAN_COMPUTE,
            context=telemetry.extract([("traceparent", request.traceparent)]),
            attributes={
                telemetry.LAYER: request.layer,
                telemetry.ROWS: sum(len(group.rows) for group in request.experts),
                telemetry.WORKER: self.worker,
                telemetry.EPOCH: request.epoch,
            },
        )


def _us(seconds: float) -> int:
    return int(seconds * 1e6)
