"""Dispatch and combine: one MoE layer computed by experts in other processes.

    output[t] = sum over ranks k of weights[t, k] * expert slots[t, k] of hidden[t]

Dispatch groups the rows by worker and sends one message per worker with each token's hidden state once; all
workers are in flight together. Combine adds up the answers by slot rank (the gate's best expert first) in
float32, so neither the placement nor the order of arrival can affect the sum. Rows that a worker failed to
compute are sent to another replica, once, and so are those whose answer is late (hedging.py): the first right answer
counts. A token that still lacks an expert is reported as failed, and only its own sequence fails.

With `combine_sum` a worker adds up what its experts make of a token, and the partial sums are added in the
order of the calls: fewer bytes come back, and placement affects the last bits.

The sequences of a step may be in several epochs; their rows are grouped by expert version (step_versions.py).

Shapes: T tokens, D hidden size, K experts per token.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from opentelemetry import trace
from opentelemetry.context import Context
from torch import Tensor

from moesaic import telemetry
from moesaic.epoch import ExpertAddress, ExpertVersion
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
from router.dispatch.combine import RowCombiner, SumCombiner
from router.dispatch.hedging import ExtraCalls, hedge_delays_s
from router.dispatch.host_staging import staging_for
from router.dispatch.layer_call import LayerCall
from router.dispatch.layer_request import LayerRequest
from router.dispatch.lost_versions import EXPERT_FAILED, EXPERT_SILENT, NO_REPLICA, LostVersions, is_mendable
from router.dispatch.race import first_to_arrive
from router.dispatch.shadow import ShadowCalls, ShadowedRows
from router.dispatch.step_versions import StepVersions
from router.dispatch.wave import Wave, WorkerCall
from router.gating.model_view import ViewRows
from router.phase_clock import Phase, PhaseClock
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import HOST_SILENT, WorkerAnswer
from router.workers.worker_link import WorkerLink

MAX_ATTEMPTS = 2
# The reason of an error where values are not finite.
NOT_FINITE = "NOT_FINITE"
_NOT_FINITE = DataLoss("the worker's answer is not finite", reason=NOT_FINITE)
# Combinations of epochs whose versions are kept for the next step.
_EPOCHS_KEPT = 16
# For the last sentence of an error that another replica would have prevented.
_CURE = "--replicas 2 keeps requests alive"


@dataclass(frozen=True, slots=True)
class DispatchRules:
    """How rows travel."""

    # How long a layer waits for an answer before it tries another replica.
    call_timeout_s: float
    # The dtype of rows on the wire; None: the dtype that the model computes in, so that nothing is lost.
    wire_dtype: common_pb2.Dtype | None = None
    # Whether a worker adds up what its experts make of a token.
    combine_sum: bool = False


@dataclass(frozen=True, slots=True)
class DispatchTools:
    """What all steps of a dispatcher share."""

    pool: ReplicaPool
    clock: PhaseClock
    rules: DispatchRules
    # The monotonic clock.
    now: Callable[[], float]
    extra: ExtraCalls
    shadows: ShadowCalls
    lost: LostVersions


@dataclass(slots=True, eq=False)
class _WaveTimes:
    """What a wave spent its time on."""

    slowest: expert_pb2.ComputeTiming | None = None
    slowest_us: int = 0
    waited_s: float = 0.0

    def note(self, answer: WorkerAnswer) -> None:
        if (busy_us := answer.busy_us) > self.slowest_us:
            self.slowest, self.slowest_us = answer.response.timing, busy_us


# The groups that each worker is asked for, and their versions.
_Chosen = dict[WorkerLink, tuple[list[int], list[bytes]]]


class Dispatcher:
    """Computes MoE layers on the workers of a replica pool. Used by the engine's thread alone."""

    def __init__(
        self,
        pool: ReplicaPool,
        clock: PhaseClock,
        rules: DispatchRules,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lost = LostVersions(pool, clock=now)
        self._tools = DispatchTools(pool, clock, rules, now, ExtraCalls(), ShadowCalls(pool), self.lost)
        # By the ids of the epochs of a step.
        self._versions: OrderedDict[tuple[str, ...], StepVersions] = OrderedDict()

    @property
    def replicas(self) -> object:
        """Another object after every change of the replicas."""
        return self._tools.pool.links

    def begin(
        self,
        views: Sequence[ViewRows],
        *,
        deadline_s: float,
        context: Context | None = None,
        shadowed: ShadowedRows | None = None,
    ) -> DispatchStep:
        """Begins a step that ends by `deadline_s` (monotonic); its spans are children of `context`. `views`: in which
        epochs its rows are computed; a single one has all rows, and need not say so. `shadowed`: which of them another
        epoch computes as well; not where workers add up what their experts make of a token."""
        return DispatchStep(
            self._tools,
            views,
            self._versions_of(views),
            deadline_s=deadline_s,
            context=context,
            shadowed=None if self._tools.rules.combine_sum else shadowed,
        )

    def _versions_of(self, views: Sequence[ViewRows]) -> StepVersions:
        ids = tuple(dict.fromkeys(run.view.epoch.id for run in views))
        found = self._versions.get(ids)
        if found is None:
            found = self._versions[ids] = StepVersions(views)
            if len(self._versions) > _EPOCHS_KEPT:
                self._versions.popitem(last=False)
        return found


class DispatchStep:
    """The layers of one micro-batch, each sent and received in order; several micro-batches may be in flight
    at once. Afterwards `failed` says which of its tokens have no valid output, and why."""

    def __init__(
        self,
        tools: DispatchTools,
        views: Sequence[ViewRows],
        versions: StepVersions,
        *,
        deadline_s: float,
        context: Context | None,
        shadowed: ShadowedRows | None,
    ) -> None:
        self._pool = tools.pool
        self._clock = tools.clock
        self._rules = tools.rules
        self._now = tools.now
        self._extra = tools.extra
        self._shadows = tools.shadows
        self._lost = tools.lost
        self._views = views
        self._versions = versions
        self._deadline_s = deadline_s
        self._context = context
        self._shadowed = shadowed
        # The incarnations of the workers that failed a call in this step, other than by being overloaded. They
        # are not asked again in it: waiting for them in every layer would add up.
        self._silent: set[str] = set()
        # Those of them whose host did not answer over one connection. Where nobody else is left they are asked once
        # more, over another one.
        self._unreached: set[str] = set()
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
        """Sends a layer to its workers without waiting for any of them. `tokens` are the tokens of the
        micro-batch that `hidden` holds; None: all of them. `hidden` and `weights` must not change before
        `receive`."""
        with self._clock.phase(Phase.ENCODE):
            layer_call = self._open(layer, hidden, slots, weights, tokens)
            self._in_flight.append(layer_call)
            self._send_wave(layer_call)
            if self._shadowed is not None:
                timeout_ms = 1 + int(1000 * self._rules.call_timeout_s)
                self._shadows.send(self._shadowed, layer_call, timeout_ms)
        return layer_call

    def receive(self, layer_call: LayerCall) -> Tensor:
        """Waits for a layer, [T, D]. Never raises because of a worker: see `failed`."""
        total = self._receive_wave(layer_call)
        for _ in range(MAX_ATTEMPTS - 1):
            if not layer_call.missing:
                break
            with self._clock.phase(Phase.ENCODE):
                self._send_wave(layer_call)
            total = self._receive_wave(layer_call)
        if layer_call.errors:
            self._note_failures(layer_call)
        self._in_flight.remove(layer_call)
        if self._shadowed is not None:
            self._shadows.note_used(layer_call)
        return total.to(layer_call.dtype)

    def finish(self) -> None:
        """Ends shadows that nobody waited for. To be called after the last layer."""
        self._shadows.end_step()

    def abandon(self) -> None:
        """Gives up the calls that are still in flight, so that their links do not wait for the answers."""
        self.finish()
        for call in (call for layer_call in self._in_flight for call in layer_call.in_flight):
            self._abandon(call)

    def _note_failures(self, layer_call: LayerCall) -> None:
        self.failed.update(layer_call.failed_tokens())
        for group, error in layer_call.errors.items():
            if is_mendable(error):
                self._lost.note(self._version_of(layer_call, group))

    def _open(
        self, layer: int, hidden: Tensor, slots: Tensor, weights: Tensor, tokens: Sequence[int] | None
    ) -> LayerCall:
        """Prepares everything that is the same for all workers."""
        staging, combine_sum = staging_for(hidden.device), self._rules.combine_sum
        wire, scales = narrow(hidden, self._rules.wire_dtype or WIRE_DTYPES[hidden.dtype])
        optional = (scales, weights if combine_sum else None)
        wire, slots, *others = staging.to_host([wire, slots, *(one for one in optional if one is not None)])
        sum_weights = others.pop().numpy().ravel() if combine_sum else None
        scales = others.pop() if others else None
        request = LayerRequest(self._versions.epoch, layer, wire, scales, sum_weights)
        groups, versions = self._versions.group(layer, slots, self._views, tokens)
        if combine_sum:
            return LayerCall(
                request, groups, versions, SumCombiner(staging, hidden), hidden.dtype, slots, tokens
            )
        decoded_dtype = wire.dtype if scales is None else torch.float32
        combiner = RowCombiner(staging, groups, weights, hidden.shape[1], decoded_dtype)
        return LayerCall(request, groups, versions, combiner, hidden.dtype, slots, tokens)

    def _send_wave(self, layer_call: LayerCall) -> None:
        """Asks one replica for each missing group, with one message per worker. Only so many calls may be asked again."""
        now_s = self._now()
        deadline_s = now_s + min(self._rules.call_timeout_s, self._share_s(layer_call, now_s))
        wave = layer_call.begin_wave(silent=self._silent, deadline_s=deadline_s)
        is_first = len(layer_call.waves) == 1
        for link, chosen in self._choose_or_fail(layer_call, wave).items():
            if is_first:
                self._extra.note_call()
            elif not self._extra.may_retry():
                break
            wave.calls.append(self._send(layer_call, link, *chosen, wave))

    def _share_s(self, layer_call: LayerCall, now_s: float) -> float:
        """The seconds of the step that a wave may take: where there are replicas to turn to, it leaves the later waves
        as much as it takes."""
        has_others = self._have_another_holder(layer_call, layer_call.missing)
        waves_left = MAX_ATTEMPTS - len(layer_call.waves) if has_others else 1
        return (self._deadline_s - now_s) / waves_left

    def _choose_or_fail(self, layer_call: LayerCall, wave: Wave) -> _Chosen:
        chosen, unheld = self._choose(layer_call, wave.excluded)
        for group in unheld:
            address = ExpertAddress(layer_call.request.layer, layer_call.groups.slots[group])
            layer_call.fail_unheld(group, _no_replica(address, self._pool.last_worker(address)))
        return chosen

    def _choose(
        self, layer_call: LayerCall, excluded: Mapping[int, Collection[str]]
    ) -> tuple[_Chosen, list[int]]:
        """Whom to ask for each of these groups, by group without the incarnations that are excluded; and the groups of
        which nobody can be asked."""
        chosen: _Chosen = {}
        unheld: list[int] = []
        num_rows: dict[WorkerLink, int] = {}
        edges = layer_call.groups.edges
        for group, left_out in excluded.items():
            address = ExpertAddress(layer_call.request.layer, layer_call.groups.slots[group])
            version = layer_call.versions[group]
            link = self._pool.pick(address, version, exclude=left_out, planned=num_rows)
            if link is None and self._unreached:
                left_out = set(left_out) - self._unreached
                link = self._pool.pick(address, version, exclude=left_out, planned=num_rows)
            if link is None:
                unheld.append(group)
                continue
            num_rows[link] = num_rows.get(link, 0) + edges[group + 1] - edges[group]
            groups, versions = chosen.setdefault(link, ([], []))
            groups.append(group)
            versions.append(version)
        return chosen, unheld

    def _send(
        self, layer_call: LayerCall, link: WorkerLink, groups: list[int], versions: list[bytes], wave: Wave
    ) -> WorkerCall:
        """Sends one worker its rows, in a span of its own if the step is traced."""
        rows, sent_s = layer_call.groups.worker_rows(groups), self._now()
        timeout_ms = 1 + int(1000 * max(0.0, wave.deadline_s - sent_s))
        request, hidden = layer_call.request.to_worker(rows, versions, timeout_ms)
        span: trace.Span = trace.INVALID_SPAN
        if self._context is not None:
            span = self._start_span(self._context, link, layer_call.request.layer, len(hidden))
            with trace.use_span(span):
                request.traceparent = telemetry.current_traceparent()
        return WorkerCall(link, rows, versions, link.send(request, hidden), span, sent_s)

    def _start_span(self, context: Context, link: WorkerLink, layer: int, num_rows: int) -> trace.Span:
        attributes: dict[str, str | int] = {
            telemetry.LAYER: layer,
            telemetry.ROWS: num_rows,
            telemetry.WORKER: link.replica.worker,
            telemetry.EPOCH: self._versions.epoch,
        }
        return telemetry.TRACER.start_span(
            telemetry.SPAN_DISPATCH, context, trace.SpanKind.CLIENT, attributes
        )

    def _receive_wave(self, layer_call: LayerCall) -> Tensor:
        """Waits for the newest wave and combines everything that was answered, [T, D] float32."""
        wave, times = layer_call.waves[-1], _WaveTimes()
        for call in wave.calls:
            if self._have_another_holder(layer_call, call.rows.groups):
                self._settle_or_hedge(layer_call, wave, call, times)
            else:
                self._settle(layer_call, wave, call, times)
        self._note_times(times)
        with self._clock.phase(Phase.COMBINE):
            return self._combine(layer_call)

    def _settle_or_hedge(
        self, layer_call: LayerCall, wave: Wave, call: WorkerCall, times: _WaveTimes
    ) -> None:
        """Waits for a call, and where it is late also for those that are sent in its place."""
        started_s = time.perf_counter()
        hedges = self._hedge_if_late(layer_call, wave, call)
        times.waited_s += time.perf_counter() - started_s
        if hedges:
            self._race(layer_call, wave, call, hedges, times)
        else:
            self._settle(layer_call, wave, call, times)

    def _hedge_if_late(self, layer_call: LayerCall, wave: Wave, call: WorkerCall) -> list[WorkerCall]:
        """The calls that are sent in place of one that is late; none where it is not, or nobody else can be asked for all
        of its rows, or too many calls were late."""
        for delay_s, is_overdue in hedge_delays_s(self._pool.late_s(call.num_rows)):
            ends_s = min(call.sent_s + delay_s, wave.deadline_s)
            if call.link.wait(call.pending, max(0.0, ends_s - self._now())) or ends_s == wave.deadline_s:
                return []
            incarnation = call.link.replica.incarnation
            excluded = {
                group: {*wave.excluded[group], *self._silent, incarnation} for group in call.rows.groups
            }
            chosen, unheld = self._choose(layer_call, excluded)
            if not unheld and self._extra.may_hedge(len(chosen), is_overdue=is_overdue):
                wave.hedges.extend(
                    self._send(layer_call, link, *asked, wave) for link, asked in chosen.items()
                )
                return wave.hedges[-len(chosen) :]
        return []

    def _race(
        self, layer_call: LayerCall, wave: Wave, late: WorkerCall, hedges: list[WorkerCall], times: _WaveTimes
    ) -> None:
        """Takes the first right answer: that to the late call, or one to a hedge, with which all hedges count and the late
        call does not."""
        racing = [late, *hedges]
        while racing:
            started_s = time.perf_counter()
            arrived = first_to_arrive(racing, wave.deadline_s, self._now) or racing[0]
            times.waited_s += time.perf_counter() - started_s
            racing.remove(arrived)
            if not self._settle(layer_call, wave, arrived, times):
                continue
            if arrived is late:
                for call in racing:
                    self._abandon(call)
                return
            if late in racing:
                racing.remove(late)
                self._pool.note_late(late.link, late.num_rows, self._now() - late.sent_s)
                self._abandon(late)

    def _settle(self, layer_call: LayerCall, wave: Wave, call: WorkerCall, times: _WaveTimes) -> bool:
        """Waits for an answer and takes it; whether there was a valid one."""
        call.received = True
        started_s = time.perf_counter()
        try:
            answer = call.link.receive(call.pending, max(0.0, wave.deadline_s - self._now()))
        except (MoesaicError, TimeoutError) as error:
            self._pool.note_failure(call.link, error)
            self._fail(layer_call, call, error)
            return False
        finally:
            times.waited_s += time.perf_counter() - started_s
        call.took_s = self._now() - call.sent_s
        times.note(answer)
        with self._clock.phase(Phase.DECODE):
            return self._accept(layer_call, call, answer)

    def _accept(self, layer_call: LayerCall, call: WorkerCall, answer: WorkerAnswer) -> bool:
        """Takes an answer; one that is not valid fails its call."""
        try:
            layer_call.accept(call, answer)
        except DataLoss as error:
            call.link.traffic.failed_calls += 1
            group = call.rows.groups[0]
            self._pool.note_wrong(call.link, error.message, self._version_of(layer_call, group))
            self._fail(layer_call, call, error)
            return False
        _end_span(call.span)
        return True

    def _abandon(self, call: WorkerCall) -> None:
        call.received = True
        call.link.abandon(call.pending)
        _end_span(call.span)

    def _have_another_holder(self, layer_call: LayerCall, groups: Iterable[int]) -> bool:
        return self._pool.have_another_holder(self._version_of(layer_call, group) for group in groups)

    def _version_of(self, layer_call: LayerCall, group: int) -> ExpertVersion:
        address = ExpertAddress(layer_call.request.layer, layer_call.groups.slots[group])
        return ExpertVersion(address, layer_call.versions[group])

    def _combine(self, layer_call: LayerCall) -> Tensor:
        """The sum of all answers, [T, D] float32; finite wherever the sums of finite rows are."""
        combiner = layer_call.combiner
        total = combiner.result()
        if not combiner.looks_finite(total) and self._fail_not_finite(layer_call):
            total = combiner.result()
        for call in layer_call.answered:
            if call.took_s is not None:
                self._pool.note_answer(call.link, call.num_rows, call.took_s)
                call.took_s = None
        for group, call in layer_call.refuted() if layer_call.not_finite else ():
            self._pool.note_wrong(call.link, _NOT_FINITE.message, self._version_of(layer_call, group))
        return total

    def _fail_not_finite(self, layer_call: LayerCall) -> bool:
        """Fails the groups whose rows are not finite, of which there may be none: sums of finite rows may overflow. Other
        groups of the same calls stay: a version that computes nonsense must not harm the sequences of other epochs."""
        found = False
        for call in list(layer_call.answered):
            failed = self._not_finite(layer_call, call)
            if failed:
                found = True
                self._fail_groups(layer_call, call, failed)
        return found

    def _not_finite(self, layer_call: LayerCall, call: WorkerCall) -> list[int]:
        """The groups of a call that are not finite; all of them where they cannot be told apart."""
        combiner = layer_call.combiner
        if torch.isfinite(combiner.outputs_of(call.rows)).all():
            return []
        if combiner.mixes_experts:
            return [*call.rows.groups]
        return [
            group
            for group in call.rows.groups
            if not torch.isfinite(combiner.outputs_of(layer_call.groups.worker_rows([group]))).all()
        ]

    def _fail_groups(self, layer_call: LayerCall, call: WorkerCall, groups: list[int]) -> None:
        """The worker is not silent: what it says of other groups, and in other layers, counts."""
        layer_call.not_finite.update(dict.fromkeys(groups, call))
        rest = layer_call.narrow(call, groups)
        layer_call.answered.remove(call)
        if rest is not None:
            layer_call.answered.append(rest)
        call.link.traffic.failed_calls += 1
        self._pool.note_doubt(call.link, _NOT_FINITE)
        rows = layer_call.groups.worker_rows(groups)
        failure = _failure(layer_call.request.layer, _NOT_FINITE, call.link.replica.worker)
        layer_call.fail(call, failure, rows)

    def _fail(self, layer_call: LayerCall, call: WorkerCall, error: MoesaicError | TimeoutError) -> None:
        _end_span(call.span, error)
        if not isinstance(error, Overloaded):
            self._silent.add(call.link.replica.incarnation)
        if isinstance(error, MoesaicError) and error.reason == HOST_SILENT:
            self._unreached.add(call.link.replica.incarnation)
        else:
            self._unreached.discard(call.link.replica.incarnation)
        layer_call.fail(call, _failure(layer_call.request.layer, error, call.link.replica.worker))

    def _note_times(self, times: _WaveTimes) -> None:
        slowest = times.slowest or expert_pb2.ComputeTiming()
        self._clock.add(Phase.WORKER_DECODE, slowest.decode_us / 1e6)
        self._clock.add(Phase.WORKER_QUEUE, slowest.queue_us / 1e6)
        self._clock.add(Phase.WORKER_COMPUTE, slowest.compute_us / 1e6)
        self._clock.add(Phase.WORKER_ENCODE, slowest.encode_us / 1e6)
        self._clock.add(Phase.WIRE, max(0.0, times.waited_s - times.slowest_us / 1e6))


def _end_span(span: trace.Span, error: Exception | None = None) -> None:
    if error is not None:
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)
    span.end()


def _no_replica(address: ExpertAddress, worker: str | None) -> MoesaicError:
    cause = f": {_public(worker)} that held it is gone and not back yet; {_CURE}" if worker else ""
    return Unavailable(
        f"layer {address.layer} slot {address.slot} has no replica left{cause}",
        reason=NO_REPLICA,
        retry_after_s=1.0,
    )


def _public(worker: str) -> str:
    """A worker as clients may know it. The name of one that was started by hand may be its address."""
    return "the expert worker" if ":" in worker else worker


def _failure(layer: int, error: MoesaicError | TimeoutError, worker: str) -> MoesaicError:
    """The error that a client sees: the kind of the failure, layer and worker, never an address."""
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(
            f"layer {layer}: an expert worker did not answer in time", reason=EXPERT_SILENT
        )
    if isinstance(error, Overloaded):
        return Overloaded(f"layer {layer}: an expert worker is overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, InvalidArgument) and error.field == "hidden.dtype":
        return FailedPrecondition(
            f"layer {layer}: an expert worker does not take rows in this engine.wire_dtype",
            reason="WIRE_DTYPE",
        )
    if isinstance(error, DataLoss) and error.reason == NOT_FINITE:
        return Unavailable(
            f"layer {layer}: an expert of {_public(worker)} gave numbers that are not finite, and no other worker "
            f"stood in; {_CURE}",
            reason=NOT_FINITE,
            retry_after_s=1.0,
        )
    return Unavailable(
        f"layer {layer}: {_public(worker)} died or failed, and no other worker stood in; {_CURE}",
        reason=EXPERT_FAILED,
        retry_after_s=1.0,
    )
