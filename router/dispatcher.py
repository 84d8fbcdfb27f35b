"""Dispatch and combine: one MoE layer computed by experts in other processes.

Rows are grouped by worker, one message per worker, each token's hidden state sent once, all workers in flight together.
The answers are combined by slot rank (the gate's best expert first) in float32, so that neither placement nor the order
of arrival can reach the sum. What a worker failed to answer is asked of another replica, once; a token that still lacks
an expert is reported as failed, and only its own sequence pays.

Shapes: T tokens, D hidden size, K experts per token; an assignment is one (token, rank) pair, numbered token * K + rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    """Computes MoE layers through a replica pool. Belongs to the engine's thread.

    `begin` opens a step; afterwards `failed` says which tokens of the step have no valid output, and why.
    """

    def __init__(self, pool: ReplicaPool, clock: PhaseClock, *, call_timeout_s: float) -> None:
        self._pool = pool
        self._clock = clock
        self._call_timeout_s = call_timeout_s
        self.failed: dict[int, MoesaicError] = {}

    def begin(self, epoch: Epoch, *, deadline_s: float, context: Context | None = None) -> None:
        """Opens a step of `epoch` that may take until `deadline_s` (monotonic); its spans belong to `context`."""
        self.failed = {}
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._context = context
        # Workers that did not answer in this step: waiting for them again in every layer would add up.
        self._silent: set[str] = set()

    def compute(
        self, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, D], slots and weights [T, K] -> [T, D]. Never raises for a worker's sake: see `failed`."""
        rows = hidden.new_zeros(slots.numel(), hidden.shape[1])
        shares = group_by_slot(slots)
        tried: dict[int, set[str]] = {share.slot: set() for share in shares}
        errors: dict[int, MoesaicError] = {}
        for _ in range(MAX_ATTEMPTS):
            self._wave(layer, hidden, shares, rows, tried, errors)
            shares = [share for share in shares if share.slot in errors]
            if not shares:
                break
        for share in shares:
            self.failed.update(dict.fromkeys(share.tokens.tolist(), errors[share.slot]))
        started = time.perf_counter()
        combined = combine(rows.view(*slots.shape, -1), weights)
        self._clock.add("combine", time.perf_counter() - started)
        return combined

    def _wave(
        self,
        layer: int,
        hidden: torch.Tensor,
        shares: Sequence[Share],
        rows: torch.Tensor,
        tried: dict[int, set[str]],
        errors: dict[int, MoesaicError],
    ) -> None:
        """Asks one replica for every share and fills `rows` [T * K, D]; `errors` says which slots lack an answer."""
        started = time.perf_counter()
        by_link: dict[WorkerLink, list[Share]] = {}
        for share in shares:
            link = self._pick(layer, share.slot, tried[share.slot])
            if link is None:
                errors.setdefault(share.slot, _no_replica(layer, share.slot))
            else:
                tried[share.slot].add(link.replica.worker)
                by_link.setdefault(link, []).append(share)
        wave_ends_s = min(self._deadline_s, time.monotonic() + self._call_timeout_s)
        calls = [
            self._send(link, layer, hidden, tuple(group), wave_ends_s) for link, group in by_link.items()
        ]
        self._clock.add("encode", time.perf_counter() - started)
        self._collect(layer, calls, rows, errors, wave_ends_s)

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

    def _collect(
        self,
        layer: int,
        calls: Sequence[_Call],
        rows: torch.Tensor,
        errors: dict[int, MoesaicError],
        wave_ends_s: float,
    ) -> None:
        """Waits for the calls of a wave; a failed one puts its slots into `errors`, a good one takes them out."""
        started = time.perf_counter()
        queue_us = compute_us = 0
        for call in calls:
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
        self._clock.add("wait", max(0.0, time.perf_counter() - started - worker_s))

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
