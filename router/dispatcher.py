"""Dispatch and combine: one MoE layer computed by experts in other processes.

Rows are grouped by worker, one message per worker, each token's hidden state sent once, all workers in flight together.
The answers are combined by slot rank (the gate's best expert first) in float32, so that neither placement nor the order
of arrival can reach the sum. What a worker failed to answer is asked of another replica, once; a token that still lacks
an expert is reported as failed, and only its own sequence pays.

Shapes: T tokens, D hidden size, K experts per token; an assignment is one (token, rank) pair, numbered token * K + rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from opentelemetry import trace
from opentelemetry.context import Context

from moesaic import telemetry
from moesaic.codec import check_tensor
from moesaic.errors import DataLoss, DeadlineExceeded, InvalidArgument, MoesaicError, Overloaded, Unavailable
from moesaic.manifest import Epoch, ExpertAddress
from moesaic.tensors import WIRE_DTYPES, from_wire, to_wire
from moesaic.v1 import expert_pb2
from router.phases import PhaseClock
from router.replica_pool import ReplicaPool
from router.worker_link import PendingCall, WorkerLink

MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Share:
    """The assignments of one slot in a layer, and the tokens they belong to; both ascending."""

    slot: int
    assignments: torch.Tensor  # [n]
    tokens: torch.Tensor  # [n]


@dataclass(frozen=True, slots=True)
class _Call:
    """One message to one worker."""

    link: WorkerLink
    shares: tuple[Share, ...]
    versions: tuple[bytes, ...]
    pending: PendingCall
    span: trace.Span


class Dispatcher:
    """Computes MoE layers through a replica pool. Belongs to the engine's thread."""

    def __init__(self, pool: ReplicaPool, clock: PhaseClock, *, call_timeout_s: float) -> None:
        self._pool = pool
        self._clock = clock
        self._call_timeout_s = call_timeout_s

    def begin(self, epoch: Epoch, *, deadline_s: float, context: Context | None = None) -> DispatchStep:
        """Opens a step of `epoch` that may take until `deadline_s` (monotonic); its spans belong to `context`."""
        return DispatchStep(
            self._pool,
            self._clock,
            epoch,
            deadline_s=deadline_s,
            call_timeout_s=self._call_timeout_s,
            context=context,
        )


@dataclass(slots=True)
class LayerCall:
    """One layer of a micro-batch in flight: what was asked, and who was asked for it."""

    layer: int
    hidden: torch.Tensor  # [T, D]
    weights: torch.Tensor  # [T, K]
    rows: torch.Tensor  # [T * K, D], filled by the answers
    shares: list[Share]
    calls: list[_Call]
    # Workers that were asked, by slot.
    tried: dict[int, set[str]]
    errors: dict[int, MoesaicError]
    wave_ends_s: float = 0.0


class DispatchStep:
    """The layers of one micro-batch. `send` and `receive` every layer in order; several micro-batches may be in
    flight at once. Afterwards `failed` says which of its tokens have no valid output, and why."""

    def __init__(
        self,
        pool: ReplicaPool,
        clock: PhaseClock,
        epoch: Epoch,
        *,
        deadline_s: float,
        call_timeout_s: float,
        context: Context | None,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._call_timeout_s = call_timeout_s
        self._context = context
        # Workers that did not answer in this step: waiting for them again in every layer would add up.
        self._silent: set[str] = set()
        self.failed: dict[int, MoesaicError] = {}

    def compute(
        self, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, D], slots and weights [T, K] -> [T, D]."""
        return self.receive(self.send(layer, hidden, slots, weights))

    def send(self, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> LayerCall:
        """Sends a layer to its workers without waiting for any."""
        shares = group_by_slot(slots)
        call = LayerCall(
            layer,
            hidden,
            weights,
            rows=hidden.new_zeros(slots.numel(), hidden.shape[1]),
            shares=shares,
            calls=[],
            tried={share.slot: set() for share in shares},
            errors={},
        )
        self._send_wave(call)
        return call

    def receive(self, call: LayerCall) -> torch.Tensor:
        """Waits for a layer, [T, D]. Never raises for a worker's sake: see `failed`."""
        self._collect(call)
        for _ in range(MAX_ATTEMPTS - 1):
            if not call.errors:
                break
            call.shares = [share for share in call.shares if share.slot in call.errors]
            self._send_wave(call)
            self._collect(call)
        for share in call.shares:
            if share.slot in call.errors:
                self.failed.update(dict.fromkeys(share.tokens.tolist(), call.errors[share.slot]))
        started = time.perf_counter()
        combined = combine(call.rows.view(*call.weights.shape, -1), call.weights)
        self._clock.add("combine", time.perf_counter() - started)
        return combined

    def _send_wave(self, call: LayerCall) -> None:
        """Asks one replica for every share; `errors` says which slots have none to ask."""
        layer, hidden, shares, tried, errors = call.layer, call.hidden, call.shares, call.tried, call.errors
        started = time.perf_counter()
        by_link: dict[WorkerLink, list[Share]] = {}
        for share in shares:
            link = self._pick(layer, share.slot, tried[share.slot])
            if link is None:
                errors.setdefault(share.slot, _no_replica(layer, share.slot))
            else:
                tried[share.slot].add(link.replica.worker)
                by_link.setdefault(link, []).append(share)
        call.wave_ends_s = min(self._deadline_s, time.monotonic() + self._call_timeout_s)
        call.calls = [
            self._send(link, layer, hidden, tuple(group), call.wave_ends_s) for link, group in by_link.items()
        ]
        self._clock.add("encode", time.perf_counter() - started)

    def _pick(self, layer: int, slot: int, tried: set[str]) -> WorkerLink | None:
        address = ExpertAddress(layer, slot)
        return self._pool.pick(address, self._epoch.versions[address], exclude=tried | self._silent)

    def _send(
        self,
        link: WorkerLink,
        layer: int,
        hidden: torch.Tensor,
        shares: tuple[Share, ...],
        wave_ends_s: float,
    ) -> _Call:
        tokens = torch.cat([share.tokens for share in shares]).unique()
        versions = tuple(self._epoch.versions[ExpertAddress(layer, share.slot)] for share in shares)
        request = expert_pb2.ComputeRequest(
            epoch=self._epoch.id,
            layer=layer,
            hidden=to_wire(hidden if len(tokens) == len(hidden) else hidden[tokens]),
            experts=[
                expert_pb2.ExpertRows(
                    slot=share.slot,
                    version=version,
                    rows=torch.searchsorted(tokens, share.tokens).tolist(),
                )
                for share, version in zip(shares, versions, strict=True)
            ],
            combine=expert_pb2.COMBINE_ROWS,
            timeout_ms=1 + int(1000 * max(0.0, wave_ends_s - time.monotonic())),
        )
        span = self._span(link, layer, len(tokens))
        with trace.use_span(span):
            request.traceparent = telemetry.current_traceparent()
        return _Call(link, shares, versions, link.send(request), span)

    def _span(self, link: WorkerLink, layer: int, num_rows: int) -> trace.Span:
        if self._context is None:
            return trace.INVALID_SPAN
        attributes: dict[str, str | int] = {
            telemetry.LAYER: layer,
            telemetry.ROWS: num_rows,
            telemetry.WORKER: link.replica.worker,
            telemetry.EPOCH: self._epoch.id,
        }
        return telemetry.TRACER.start_span(
            telemetry.SPAN_DISPATCH, self._context, trace.SpanKind.CLIENT, attributes
        )

    def _collect(self, wave: LayerCall) -> None:
        """Waits for the calls of a wave; a failed one puts its slots into `errors`, a good one takes them out."""
        layer, rows, errors, wave_ends_s = wave.layer, wave.rows, wave.errors, wave.wave_ends_s
        started = time.perf_counter()
        queue_us = compute_us = 0
        for call in wave.calls:
            try:
                response = call.link.receive(call.pending, max(0.0, wave_ends_s - time.monotonic()))
                self._take(call, response, rows)
                for share in call.shares:
                    errors.pop(share.slot, None)
                queue_us = max(queue_us, response.timing.queue_us)
                compute_us = max(compute_us, response.timing.compute_us)
            except (MoesaicError, TimeoutError) as error:
                self._note_failure(call, error)
                errors.update({share.slot: _failure(layer, error) for share in call.shares})
            finally:
                call.span.end()
        worker_s = (queue_us + compute_us) / 1e6
        self._clock.add("worker queue", queue_us / 1e6)
        self._clock.add("worker compute", compute_us / 1e6)
        self._clock.add("wire", max(0.0, time.perf_counter() - started - worker_s))

    def _take(self, call: _Call, response: expert_pb2.ComputeResponse, rows: torch.Tensor) -> None:
        """Checks an answer (epoch, versions, shape, finite) and puts its rows where their assignments are."""
        if response.epoch != self._epoch.id or tuple(response.versions) != call.versions:
            raise DataLoss("the worker computed with another version", reason="WRONG_VERSION")
        assignments = torch.cat([share.assignments for share in call.shares])
        try:
            check_tensor(
                response.output,
                field="output",
                dtypes=(WIRE_DTYPES[rows.dtype],),
                shape=(len(assignments), rows.shape[1]),
            )
        except InvalidArgument as error:
            raise DataLoss(f"the worker's answer is malformed: {error.message}") from error
        output = from_wire(response.output).to(rows.device)
        if not torch.isfinite(output).all():
            raise DataLoss("the worker's answer is not finite", reason="NOT_FINITE")
        rows[assignments] = output

    def _note_failure(self, call: _Call, error: MoesaicError | TimeoutError) -> None:
        self._pool.shun(call.link)
        if not isinstance(error, Overloaded):
            self._silent.add(call.link.replica.worker)
        call.span.set_status(trace.StatusCode.ERROR, type(error).__name__)


def group_by_slot(slots: torch.Tensor) -> list[Share]:
    """slots [T, K] -> one share for every slot that is used, by slot."""
    num_ranks = slots.shape[1]
    ordered, assignments = slots.flatten().cpu().sort(stable=True)
    used, counts = ordered.unique_consecutive(return_counts=True)
    return [
        Share(slot, part, part // num_ranks)
        for slot, part in zip(used.tolist(), assignments.split(counts.tolist()), strict=True)
    ]


def combine(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [T, K, D], weights [T, K] -> [T, D]: rank by rank in float32, then back to the rows' dtype."""
    total = rows[:, 0].float() * weights[:, :1]
    for rank in range(1, rows.shape[1]):
        total += rows[:, rank].float() * weights[:, rank : rank + 1]
    return total.to(rows.dtype)


def _no_replica(layer: int, slot: int) -> MoesaicError:
    return Unavailable(
        f"layer {layer} slot {slot} has no replica left", reason="NO_REPLICA", retry_after_s=1.0
    )


def _failure(layer: int, error: MoesaicError | TimeoutError) -> MoesaicError:
    """What a caller is told: the kind of the failure and the layer, never an address."""
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"layer {layer}: an expert worker did not answer in time")
    if isinstance(error, Overloaded):
        return Overloaded(f"layer {layer}: an expert worker is overloaded", retry_after_s=error.retry_after_s)
    return Unavailable(f"layer {layer}: an expert worker failed", reason="EXPERT_FAILED", retry_after_s=1.0)
