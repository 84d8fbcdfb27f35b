"""Dispatch and combine: one MoE layer computed by experts in other processes.

Rows are grouped by worker, one message per worker, each token's hidden state sent once, all workers in flight together.
The answers are combined by slot rank (the gate's best expert first) in float32, so that neither placement nor the order
of arrival can reach the sum. What a worker failed to answer is asked of another replica, once; a token that still lacks
an expert is reported as failed, and only its own sequence pays.

With `combine_sum` a worker adds up what its experts say of a token, and the partial sums are added in the order of the
calls: fewer bytes come back, and placement reaches the last bits.
"""

# Shapes: T tokens, D hidden size, K experts per token; an assignment is one (token, rank) pair, numbered token * K + rank.

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from opentelemetry import trace
from opentelemetry.context import Context
from torch import Tensor

from moesaic import telemetry
from moesaic.epoch import Epoch, ExpertAddress
from moesaic.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MoesaicError,
    Overloaded,
    Unavailable,
)
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.tensors import WIRE_DTYPES, narrow
from router.dispatch.combine import RowLanding, SumLanding
from router.dispatch.host_staging import staging_for
from router.dispatch.layer_call import LayerCall, WorkerCall
from router.dispatch.layer_request import LayerMessage
from router.dispatch.row_grouping import Part, SlotOrder
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import WorkerAnswer
from router.workers.worker_link import WorkerLink

MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class DispatchRules:
    """How rows travel."""

    # The longest that a layer waits for one answer before it tries the next replica.
    call_timeout_s: float
    # None: the dtype that the model computes in, so that nothing is lost.
    wire_dtype: common_pb2.Dtype | None = None
    # Workers add up what their experts say of a token.
    combine_sum: bool = False


class Dispatcher:
    """Computes MoE layers through a replica pool. Belongs to the engine's thread."""

    def __init__(self, pool: ReplicaPool, clock: PhaseClock, rules: DispatchRules) -> None:
        self._pool = pool
        self._clock = clock
        self._rules = rules

    def begin(self, epoch: Epoch, *, deadline_s: float, context: Context | None = None) -> DispatchStep:
        """Opens a step of `epoch` that may take until `deadline_s` (monotonic); its spans belong to `context`."""
        return DispatchStep(
            self._pool, self._clock, self._rules, epoch, deadline_s=deadline_s, context=context
        )


class DispatchStep:
    """The layers of one micro-batch. `send` and `receive` every layer in order; several micro-batches may be in
    flight at once. Afterwards `failed` says which of its tokens have no valid output, and why."""

    def __init__(
        self,
        pool: ReplicaPool,
        clock: PhaseClock,
        rules: DispatchRules,
        epoch: Epoch,
        *,
        deadline_s: float,
        context: Context | None,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._rules = rules
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._context = context
        # Workers that did not answer in this step: waiting for them again in every layer would add up.
        self._silent: set[str] = set()
        self._in_flight: list[LayerCall] = []
        self.failed: dict[int, MoesaicError] = {}

    def compute(self, layer: int, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, D], slots and weights [T, K] -> [T, D]."""
        return self.receive(self.send(layer, hidden, slots, weights))

    def send(
        self,
        layer: int,
        hidden: Tensor,
        slots: Tensor,
        weights: Tensor,
        *,
        tokens: Sequence[int] | None = None,
    ) -> LayerCall:
        """Sends a layer to its workers without waiting for any. `tokens` says which of the micro-batch's tokens the
        rows of `hidden` are; None: all of them. `hidden` and `weights` must not change before `receive`."""
        started_s = time.perf_counter()
        call = self._open(layer, hidden, slots, weights, tokens)
        self._in_flight.append(call)
        self._send_wave(call, range(len(call.order.slots)))
        self._clock.add("encode", time.perf_counter() - started_s)
        return call

    def receive(self, call: LayerCall) -> Tensor:
        """Waits for a layer, [T, D]. Never raises for a worker's sake: see `failed`."""
        total = self._collect(call)
        for _ in range(MAX_ATTEMPTS - 1):
            if not call.errors:
                break
            started_s = time.perf_counter()
            self._send_wave(call, sorted(call.errors))
            self._clock.add("encode", time.perf_counter() - started_s)
            total = self._collect(call)
        if call.errors:
            self.failed.update(call.failed_tokens())
        self._in_flight.remove(call)
        return total.to(call.dtype)

    def abandon(self) -> None:
        """Gives up what is still in flight, so that links need not keep a place for its answers."""
        for asked in (asked for call in self._in_flight for asked in call.wave if not asked.landed):
            with contextlib.suppress(MoesaicError, TimeoutError):
                asked.link.receive(asked.pending, 0.0)
            _end_span(asked.span)

    def _open(
        self, layer: int, hidden: Tensor, slots: Tensor, weights: Tensor, tokens: Sequence[int] | None
    ) -> LayerCall:
        """Everything that is the same for all workers."""
        staging, combine_sum = staging_for(hidden.device), self._rules.combine_sum
        wire, scales = narrow(hidden, self._rules.wire_dtype or WIRE_DTYPES[hidden.dtype])
        optional = (scales, weights if combine_sum else None)
        wire, slots, *others = staging.to_host([wire, slots, *(one for one in optional if one is not None)])
        sum_weights = others.pop().numpy().ravel() if combine_sum else None
        scales = others.pop() if others else None
        order = SlotOrder.of(slots)
        landed_dtype = wire.dtype if scales is None else torch.float32
        return LayerCall(
            layer=layer,
            dtype=hidden.dtype,
            order=order,
            message=LayerMessage(self._epoch.id, layer, wire, scales, sum_weights),
            landing=SumLanding(staging, hidden)
            if combine_sum
            else RowLanding(staging, order, weights, hidden.shape[1], landed_dtype),
            tokens=tokens,
        )

    def _send_wave(self, call: LayerCall, places: Iterable[int]) -> None:
        """Asks one replica for every one of `places`; `errors` says for which there is none to ask."""
        by_link: dict[WorkerLink, tuple[list[int], list[bytes]]] = {}
        for place in places:
            address = ExpertAddress(call.layer, call.order.slots[place])
            version = self._epoch.versions[address]
            exclude = self._silent | call.tried[place] if call.errors else self._silent
            link = self._pool.pick(address, version, exclude=exclude)
            if link is None:
                if place not in call.errors:
                    call.fail(call.order.part([place]), _no_replica(address))
                continue
            its_places, its_versions = by_link.setdefault(link, ([], []))
            its_places.append(place)
            its_versions.append(version)
        now_s = time.monotonic()
        call.wave_ends_s = min(self._deadline_s, now_s + self._rules.call_timeout_s)
        timeout_ms = 1 + int(1000 * max(0.0, call.wave_ends_s - now_s))
        call.wave = []
        for link, (its_places, its_versions) in by_link.items():
            part = call.order.part(its_places)
            call.wave.append(self._send(call, link, part, its_versions, timeout_ms))

    def _send(
        self, call: LayerCall, link: WorkerLink, part: Part, versions: list[bytes], timeout_ms: int
    ) -> WorkerCall:
        request, rows = call.message.to_worker(part, versions, timeout_ms)
        span: trace.Span = trace.INVALID_SPAN
        if self._context is not None:
            span = self._start_span(self._context, link, call.layer, len(rows))
            with trace.use_span(span):
                request.traceparent = telemetry.current_traceparent()
        return WorkerCall(link, part, versions, link.send(request, rows), span)

    def _start_span(self, context: Context, link: WorkerLink, layer: int, num_rows: int) -> trace.Span:
        attributes: dict[str, str | int] = {
            telemetry.LAYER: layer,
            telemetry.ROWS: num_rows,
            telemetry.WORKER: link.replica.worker,
            telemetry.EPOCH: self._epoch.id,
        }
        return telemetry.TRACER.start_span(
            telemetry.SPAN_DISPATCH, context, trace.SpanKind.CLIENT, attributes
        )

    def _collect(self, call: LayerCall) -> Tensor:
        """Waits for a wave and adds up everything that has landed, [T, D] float32. A call that failed puts its places
        into `errors`, a good one takes them out."""
        slowest, slowest_us = expert_pb2.ComputeTiming(), 0
        waited_s = decode_s = 0.0
        for asked in call.wave:
            started_s = time.perf_counter()
            asked.landed = True
            try:
                answer = asked.link.receive(asked.pending, max(0.0, call.wave_ends_s - time.monotonic()))
            except (MoesaicError, TimeoutError) as error:
                waited_s += time.perf_counter() - started_s
                self._note_failure(call, asked, error)
                _end_span(asked.span, error)
                continue
            arrived_s = time.perf_counter()
            waited_s += arrived_s - started_s
            if (busy_us := answer.busy_us) > slowest_us:
                slowest, slowest_us = answer.response.timing, busy_us
            self._take(call, asked, answer)
            decode_s += time.perf_counter() - arrived_s
        self._note_times(slowest, slowest_us, waited_s, decode_s)
        started_s = time.perf_counter()
        total = self._add_up(call)
        self._clock.add("combine", time.perf_counter() - started_s)
        return total

    def _take(self, call: LayerCall, asked: WorkerCall, answer: WorkerAnswer) -> None:
        """Checks an answer and puts its rows where they belong."""
        try:
            call.message.check(answer, asked.part, asked.versions)
        except DataLoss as error:
            self._note_failure(call, asked, error)
            _end_span(asked.span, error)
            return
        call.landing.put(asked.part, answer)
        call.answered.append(asked)
        _end_span(asked.span)
        if call.errors:
            for place in asked.part.places:
                call.errors.pop(place, None)

    def _add_up(self, call: LayerCall) -> Tensor:
        """[T, D] float32, of whatever has landed; finite wherever the experts' own sums are."""
        total = call.landing.total()
        if not call.landing.looks_finite(total) and self._blame(call):
            total = call.landing.total()
        return total

    def _blame(self, call: LayerCall) -> bool:
        """Takes back what is not finite; whether there was any: sums of finite rows may overflow."""
        found = False
        for asked in list(call.answered):
            if not torch.isfinite(call.landing.of(asked.part)).all():
                found = True
                call.answered.remove(asked)
                self._note_failure(
                    call, asked, DataLoss("the worker's answer is not finite", reason="NOT_FINITE")
                )
        return found

    def _note_failure(self, call: LayerCall, asked: WorkerCall, error: MoesaicError | TimeoutError) -> None:
        worker = asked.link.replica.worker
        self._pool.shun(asked.link)
        if not isinstance(error, Overloaded):
            self._silent.add(worker)
        call.fail(asked.part, _failure(call.layer, error))
        for place in asked.part.places:
            call.tried[place].add(worker)

    def _note_times(
        self, slowest: expert_pb2.ComputeTiming, slowest_us: int, waited_s: float, decode_s: float
    ) -> None:
        self._clock.add("worker decode", slowest.decode_us / 1e6)
        self._clock.add("worker queue", slowest.queue_us / 1e6)
        self._clock.add("worker compute", slowest.compute_us / 1e6)
        self._clock.add("worker encode", slowest.encode_us / 1e6)
        self._clock.add("wire", max(0.0, waited_s - slowest_us / 1e6))
        self._clock.add("decode", decode_s)


def _end_span(span: trace.Span, error: Exception | None = None) -> None:
    if error is not None:
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)
    span.end()


def _no_replica(address: ExpertAddress) -> MoesaicError:
    return Unavailable(
        f"layer {address.layer} slot {address.slot} has no replica left",
        reason="NO_REPLICA",
        retry_after_s=1.0,
    )


def _failure(layer: int, error: MoesaicError | TimeoutError) -> MoesaicError:
    """What a caller is told: the kind of the failure and the layer, never an address."""
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"layer {layer}: an expert worker did not answer in time")
    if isinstance(error, Overloaded):
        return Overloaded(f"layer {layer}: an expert worker is overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, InvalidArgument) and error.field == "hidden.dtype":
        return FailedPrecondition(
            f"layer {layer}: an expert worker does not take rows in this engine.wire_dtype",
            reason="WIRE_DTYPE",
        )
    return Unavailable(f"layer {layer}: an expert worker failed", reason="EXPERT_FAILED", retry_after_s=1.0)
