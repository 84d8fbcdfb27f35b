"""The loop of a router: take commands, choose a batch, run it, sample, report. One thread owns all of it.

Other threads only put commands into its inbox, and the engine's thread never waits for those that receive its
events. Every sequence ends with exactly one Finished or Failed, or silently when it was cancelled. However
it ends, its KV blocks are freed at once.

A sequence that lacks an expert for now is parked, and the chunk that failed is computed again when it is tried next: calls
of experts have no side effects, and the same keys and values go to the same places. The others run on.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moesaic.errors import Aborted, DeadlineExceeded, InternalError, MoesaicError, Unavailable
from router.attention.packed_batch import PackedBatch, pack
from router.cache.kv_cache import KVCache
from router.decoders.capture import CapturedRows
from router.decoders.decoder import MicroBatch, RouterModel
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.lost_versions import is_mendable
from router.dispatch.shadow import Shadow, ShadowedRows
from router.engine import sampler
from router.engine.epoch_tally import EpochTallies, EpochTally
from router.engine.expert_waits import ExpertWaits
from router.engine.live_sequence import LiveSequence, Reading
from router.engine.overlap import micro_batches
from router.engine.request import Failed, Finished, SequenceRequest, TokenGenerated
from router.engine.sampling_params import SampledToken
from router.gating.absence import Absence
from router.gating.model_view import ViewRows
from router.phase_clock import INSIDE_FORWARD, Phase, PhaseClock
from router.scheduling.admission import Admission
from router.scheduling.scheduler import Scheduler, count
from router.scheduling.sequence import Chunk

log = logging.getLogger(__name__)

# The reason of the error that ends a sequence whose epoch is given up.
EPOCH_RETIRED = "epoch_retired"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the present state of the queues."""

    steps: int
    prompt_tokens: int
    generated_tokens: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int
    prefix_lookup_tokens: int
    prefix_hit_tokens: int
    overlapped_steps: int
    parked: int = 0
    # Assignments to experts that were substituted or left out.
    degraded: int = 0
    # Sequences that were refused or shed, by reason.
    refusals: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Cancel:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class _Pause:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class _Resume:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class _Retire:
    epoch: str


_Command = SequenceRequest | _Cancel | _Pause | _Resume | _Retire


class Engine:
    """Runs sequences on one model, each in its own view of it. `overlap` splits steps into two micro-batches."""

    def __init__(
        self,
        model: RouterModel,
        cache: KVCache,
        scheduler: Scheduler,
        dispatcher: Dispatcher,
        clock: PhaseClock,
        *,
        overlap: bool,
        admission: Admission,
        missing_wait_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`missing_wait_s`: the longest that a sequence waits for a replica of an expert. `now`: by which deadlines pass."""
        self._model = model
        self._cache = cache
        self._scheduler = scheduler
        self._dispatcher = dispatcher
        self._clock = clock
        self._overlap = overlap
        self._admission = admission
        self._now = now
        self._live: dict[str, LiveSequence] = {}
        self._waits = ExpertWaits(missing_wait_s)
        # Bounded, because a request that is not admitted is not put in.
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        # Never held while anything is computed, so that a refusal waits for no step.
        self._lock = threading.Lock()
        # The open sequences by epoch; those without any are left out.
        self._open: Counter[str] = Counter()
        self._tallies = EpochTallies()
        self._shadow: Shadow | None = None
        self._stopping = False
        self._steps = self._overlapped_steps = self._prompt_tokens = self._generated_tokens = 0
        self._degraded = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_open(self) -> int:
        """The number of sequences that were submitted and have not ended."""
        return self._open.total()

    def open_sequences(self) -> dict[str, int]:
        """The number of open sequences by epoch."""
        with self._lock:
            return dict(self._open)

    def tallies(self) -> Mapping[str, EpochTally]:
        """How the sequences of each epoch do."""
        return self._tallies.snapshot()

    def submit(self, request: SequenceRequest) -> None:
        """Admits a sequence. Thread-safe. Raises Overloaded or Unavailable."""
        with self._lock:
            if self._stopping:
                raise _stopping()
            self._admission.admit(request.sequence_id, request.cost, request.deadline_s - self._now())
            self._open[request.view.epoch.id] += 1
            self._inbox.put(request)

    def cancel(self, sequence_id: str) -> None:
        """Ends a sequence without further events if it has not ended yet. Thread-safe."""
        self._inbox.put(_Cancel(sequence_id))

    def pause(self, sequence_id: str) -> None:
        """Computes nothing of a sequence, and frees what it holds, until it is resumed. Thread-safe."""
        self._inbox.put(_Pause(sequence_id))

    def resume(self, sequence_id: str) -> None:
        """Queues a paused sequence again. Thread-safe."""
        self._inbox.put(_Resume(sequence_id))

    def retire(self, epoch: str) -> None:
        """Ends the sequences that are still in this epoch, with an error that says how far they got. Thread-safe."""
        self._inbox.put(_Retire(epoch))

    def set_shadow(self, shadow: Shadow | None) -> None:
        """Which sequences are shadowed from the next step on, and by what. Thread-safe."""
        self._shadow = shadow

    def stop(self, timeout_s: float) -> None:
        """Fails the sequences that are still open and ends the thread, if it was started."""
        with self._lock:
            self._stopping = True
            self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def stats(self) -> EngineStats:
        prefixes = self._scheduler.prefixes
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._scheduler.pool.num_used,
            kv_blocks_total=self._scheduler.pool.num_blocks,
            preemptions=self._scheduler.num_preemptions,
            prefix_lookup_tokens=0 if prefixes is None else prefixes.num_looked_up,
            prefix_hit_tokens=0 if prefixes is None else prefixes.num_hit,
            overlapped_steps=self._overlapped_steps,
            parked=self._scheduler.num_parked,
            degraded=self._degraded,
            refusals=self._admission.refusals,
        )

    def _loop(self) -> None:
        try:
            while self._take_commands():
                with self._clock.phase(Phase.SCHEDULE):
                    self._expire()
                    self._try_again()
                    chunks = self._scheduler.schedule()
                if chunks:
                    self._step(chunks)
                if not self._live:
                    self._scheduler.check_integrity()
        except Exception:
            # Only a bug outside a step leads here. The engine is dead, and open sequences fail below.
            log.exception("the engine died")
        finally:
            self._abandon()

    def _take_commands(self) -> bool:
        """Carries out all commands, and waits while there is no sequence to run. False: the engine stops."""
        while not self._scheduler.has_work or not self._inbox.empty():
            try:
                command = self._inbox.get(timeout=self._idle_s())
            except (
                queue.Empty
            ):  # the deadline of a paused sequence, or the next look at those that are parked
                return True
            if command is None:
                return False
            self._carry_out(command)
        return True

    def _carry_out(self, command: _Command) -> None:
        if isinstance(command, SequenceRequest):
            tally = self._tallies.of(command.view.epoch.id)
            live = self._live[command.sequence_id] = LiveSequence(command, tally)
            self._scheduler.add(live.sequence)
            return
        if isinstance(command, _Retire):
            self._fail_epoch(command.epoch)
            return
        known = self._live.get(command.sequence_id)
        if known is None:
            return
        match command:
            case _Cancel():
                # A stop string ends an answer in this way.
                in_time = known.request.deadline_s > self._now()
                self._admission.note_answer(known.num_generated, is_whole=in_time)
                self._end(known)
            case _Pause():
                self._waits.end(known)
                self._scheduler.pause(known.sequence)
            case _Resume():
                self._scheduler.resume(known.sequence)

    def _fail_epoch(self, epoch: str) -> None:
        for live in [live for live in self._live.values() if live.request.view.epoch.id == epoch]:
            self._fail(
                live,
                Aborted(
                    f"the epoch of this request was retired after {len(live.sequence.output)} tokens; send it again",
                    reason=EPOCH_RETIRED,
                ),
            )

    def _idle_s(self) -> float | None:
        """How long the engine may wait while all its sequences are paused or parked; None if it has none."""
        times_s = [live.request.deadline_s for live in self._live.values()]
        next_s = self._waits.next_s()
        if next_s is not None:
            times_s.append(next_s)
        return max(0.0, min(times_s) - self._now()) if times_s else None

    def _expire(self) -> None:
        for live, error in self._waits.over():
            if self._scheduler.is_parked(live.sequence):
                self._fail(live, error)
        now = self._now()
        for live in [live for live in self._live.values() if live.request.deadline_s <= now]:
            self._admission.note_answer(live.num_generated, is_whole=False)
            self._fail(live, DeadlineExceeded(f"deadline passed after {len(live.sequence.output)} tokens"))
        for live, error in self._hopeless(now):
            self._fail(live, error)

    def _hopeless(self, now: float) -> list[tuple[LiveSequence, MoesaicError]]:
        """The sequences that wait and can no longer be in time, with why."""
        waiting = [live for live in self._live.values() if not live.started]
        with self._lock:
            errors = [
                self._admission.shed(live.request.sequence_id, live.request.deadline_s - now)
                for live in waiting
            ]
        return [(live, error) for live, error in zip(waiting, errors, strict=True) if error is not None]

    def _try_again(self) -> None:
        """Lets the parked sequences run, if their experts may be back."""
        for live in self._waits.take_due(self._dispatcher.replicas):
            self._scheduler.unpark(live.sequence)

    def _step(self, chunks: tuple[Chunk, ...]) -> None:
        """Runs one batch and delivers its results. An unexpected error fails this batch alone."""
        chunks = by_view(chunks)
        lives = [self._live[chunk.sequence.sequence_id] for chunk in chunks]
        started = time.perf_counter()
        replicas, num_lost = self._dispatcher.replicas, self._dispatcher.lost.num_noted
        parts: list[MicroBatch] = []
        try:
            parts, readings = self._pack(micro_batches(chunks) if self._overlap else (chunks,))
            for reading in readings:
                reading.live.note_step(reading.chunk)
            logits = self._forward(parts)
            for part in parts:
                part.experts.finish()
            complete, missing = self._complete(readings)
            # What has just been found to be lost is avoided by those who can at once.
            found_lost = self._dispatcher.lost.num_noted > num_lost
            for reading in missing:
                self._hold(reading, time.perf_counter() - started, replicas, found_lost=found_lost)
            self._deliver(complete, logits)
        except Exception:
            log.exception("a step failed")
            for part in parts:
                part.experts.abandon()
            for live in lives:
                self._fail(live, InternalError("internal error"))
        else:
            if not any(part.experts.failed for part in parts):
                self._observe(chunks, time.perf_counter() - started)
        self._steps += 1
        self._overlapped_steps += len(parts) > 1

    def _observe(self, chunks: tuple[Chunk, ...], seconds: float) -> None:
        self._scheduler.observe(chunks, seconds)
        num_decoding, _ = count(chunks)
        with self._lock:
            self._admission.note_step(num_decoding, seconds)

    def _pack(self, parts: Iterable[tuple[Chunk, ...]]) -> tuple[list[MicroBatch], list[Reading]]:
        """The micro-batches of a step, and what each chunk reads from their output."""
        with self._clock.phase(Phase.SCHEDULE):
            batches: list[MicroBatch] = []
            readings: list[Reading] = []
            for chunks in parts:
                lives = [self._live[chunk.sequence.sequence_id] for chunk in chunks]
                batch = pack(chunks, self._model.layout)
                absences = [self._absence(live) for live in lives]
                views = _views(lives, batch, absences)
                experts = self._dispatcher.begin(
                    views,
                    deadline_s=max(live.request.deadline_s for live in lives),
                    # A batch has one set of spans, in the first recorded trace among those of its sequences.
                    context=next((live.trace for live in lives if live.trace is not None), None),
                    shadowed=self._shadowed(lives, batch),
                )
                first_logit = sum(len(earlier.rows) for earlier in batches)
                rows: list[int] = []
                for live, chunk, first_row, absence in zip(
                    lives, chunks, batch.first_rows, absences, strict=True
                ):
                    reading = live.read(chunk, first_row, first_logit + len(rows), experts.failed, absence)
                    rows += reading.wanted
                    readings.append(reading)
                wanted = torch.tensor(rows, dtype=torch.long)
                batches.append(MicroBatch(batch, wanted, experts, views, _captures(lives, batch)))
        return batches, readings

    def _absence(self, live: LiveSequence) -> Absence | None:
        """What a chunk of this sequence does without; a new one for every chunk, as it counts what that does."""
        if live.stand_in is None:
            return None
        slots = self._dispatcher.lost.slots_of(live.request.view)
        return Absence(slots, live.stand_in) if slots else None

    def _shadowed(self, lives: Sequence[LiveSequence], batch: PackedBatch) -> ShadowedRows | None:
        """The tokens of a batch that another epoch computes as well; None without any."""
        shadow = self._shadow
        if shadow is None:
            return None
        tokens = frozenset(
            token
            for live, chunk, first in zip(lives, batch.chunks, batch.first_rows, strict=True)
            if live.request.view.epoch.id == shadow.epoch and live.shadow_point < shadow.share
            for token in range(first, first + chunk.num_tokens)
        )
        tally = self._tallies.of(shadow.view.epoch.id).shadow
        return ShadowedRows(shadow.view, tokens, tally) if tokens else None

    def _forward(self, parts: Sequence[MicroBatch]) -> torch.Tensor:
        """Runs the model. Returns the logits [N, V] of the wanted rows, micro-batch by micro-batch."""
        started, inside_s = time.perf_counter(), self._clock.total(INSIDE_FORWARD)
        if self._scheduler.states is not None and self._cache.states is not None:
            self._cache.states.apply(self._scheduler.states.take_copies())
        logits = self._model.forward(parts, self._cache)
        inside_s = self._clock.total(INSIDE_FORWARD) - inside_s
        self._clock.add(Phase.DENSE, time.perf_counter() - started - inside_s)
        return logits

    def _complete(self, readings: list[Reading]) -> tuple[list[Reading], list[Reading]]:
        """Records chunks as computed. Returns them, and those that lack an expert's output."""
        complete: list[Reading] = []
        missing: list[Reading] = []
        for reading in readings:
            sequence, chunk = reading.live.sequence, reading.chunk
            if chunk.start != sequence.num_computed:  # its first half is missing
                continue
            if reading.error is not None:
                missing.append(reading)
                continue
            self._waits.end(reading.live)
            self._degraded += reading.live.note_computed(reading)
            before = sequence.num_prompt_tokens - chunk.start
            self._prompt_tokens += max(0, min(chunk.num_tokens, before))
            self._scheduler.advance(chunk)
            if chunk.reaches_end and not reading.live.num_generated:
                with self._lock:
                    self._admission.note_read(sequence.sequence_id)
            complete.append(reading)
        return complete, missing

    def _hold(self, reading: Reading, took_s: float, replicas: object, *, found_lost: bool) -> None:
        """Parks or fails a sequence that lacks an expert after a step of `took_s` seconds over these replicas. `found_lost`:
        whether more is known to be lost than before."""
        live, error = reading.live, reading.error
        assert error is not None
        if live.request.on_missing == "fail" or not is_mendable(error):
            self._fail(live, error)
            return
        self._waits.note(live, error, took_s, replicas)
        if live.stand_in is None or not found_lost or live.sequence.state is not None:
            self._scheduler.park(live.sequence)

    def _deliver(self, readings: list[Reading], logits: torch.Tensor) -> None:
        """Scores prompts, samples next tokens, reports them and ends what is finished."""
        with self._clock.phase(Phase.SAMPLE):
            for reading in readings:
                self._score(reading, logits)
            readings = [reading for reading in readings if self._is_live(reading)]
            drawing = [reading for reading in readings if reading.samples]
            tokens = self._sample(drawing, logits)
        with self._clock.phase(Phase.DELIVER):
            for reading in readings:
                finished = reading.live.reach_end_of_prompt() if reading.chunk.reaches_end else None
                if finished is not None:
                    self._finish(reading.live, finished)
            for reading, token in zip(drawing, tokens, strict=True):
                if isinstance(token, MoesaicError):
                    self._reject(reading.live, token)
                else:
                    self._take(reading.live, token)

    def _score(self, reading: Reading, logits: torch.Tensor) -> None:
        """Takes the log probabilities of a chunk's prompt tokens, if the request asks for them."""
        if not reading.scored or not self._is_live(reading):
            return
        num_top = reading.live.request.sampling.prompt_logprobs or 0
        try:
            scores = sampler.score(logits[reading.scored_logits], reading.targets, num_top)
        except MoesaicError as error:
            self._reject(reading.live, error)
        else:
            reading.live.take_scores(scores)

    def _sample(self, readings: list[Reading], logits: torch.Tensor) -> list[SampledToken | MoesaicError]:
        """The next token of each sequence, or why it has none."""
        if not readings:
            return []
        wanted = [reading.last_logit for reading in readings]
        rows = logits if len(wanted) == len(logits) else logits[wanted]
        return sampler.sample(rows, [reading.live.sampling for reading in readings])

    def _is_live(self, reading: Reading) -> bool:
        return reading.live.request.sequence_id in self._live

    def _take(self, live: LiveSequence, token: SampledToken) -> None:
        """Adds a token to its sequence and reports it, with the end if it is the last."""
        self._generated_tokens += 1
        generated = live.take_token(token)
        if generated.finished is None:
            live.request.on_event(generated)
        else:
            self._finish(live, generated)

    def _finish(self, live: LiveSequence, event: Finished | TokenGenerated) -> None:
        """Ends a sequence as it should, and reports it."""
        self._end(live)
        self._admission.note_answer(live.num_generated)
        live.tally.finished += 1
        live.request.on_event(event)

    def _reject(self, live: LiveSequence, error: MoesaicError) -> None:
        """Fails a sequence whose values are wrong, and keeps them from being reused by others."""
        self._scheduler.discard_cached(live.sequence)
        self._fail(live, error)

    def _fail(self, live: LiveSequence, error: MoesaicError) -> None:
        if live.request.sequence_id in self._live:
            self._end(live)
            live.tally.note_failure(error)
            live.request.on_event(Failed(error))

    def _end(self, live: LiveSequence) -> None:
        """Removes a sequence. Its blocks are free before its end is reported."""
        if self._live.pop(live.request.sequence_id, None) is not None:
            self._waits.end(live)
            self._scheduler.remove(live.sequence)
            epoch = live.request.view.epoch.id
            with self._lock:
                self._admission.end(live.request.sequence_id)
                self._open[epoch] -= 1
                if not self._open[epoch]:
                    del self._open[epoch]

    def _abandon(self) -> None:
        """Fails every sequence that is left when the loop has ended."""
        with self._lock:
            self._stopping = True
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, SequenceRequest):
                command.on_event(Failed(_stopping()))
        for live in list(self._live.values()):
            self._fail(live, _stopping())


def by_view(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    """The same chunks, those of one view behind one another, and otherwise in their order."""
    order: dict[str, int] = {}
    for chunk in chunks:
        order.setdefault(chunk.sequence.view, len(order))
    if len(order) == 1:
        return chunks
    return tuple(sorted(chunks, key=lambda chunk: order[chunk.sequence.view]))


def _views(
    lives: Sequence[LiveSequence], batch: PackedBatch, absences: Sequence[Absence | None]
) -> tuple[ViewRows, ...]:
    """Which rows of a batch see the model in which way."""
    views: list[ViewRows] = []
    for live, chunk, first, absence in zip(lives, batch.chunks, batch.first_rows, absences, strict=True):
        start, view = first, live.request.view
        if views and views[-1].view.key == view.key and views[-1].absence is absence is None:
            last = views.pop()
            start, view = last.start, last.view
        views.append(ViewRows(view, start, first + chunk.num_tokens, absence))
    return tuple(views)


def _captures(lives: Sequence[LiveSequence], batch: PackedBatch) -> tuple[CapturedRows, ...]:
    return tuple(
        CapturedRows(live.request.capture, first, first + chunk.num_tokens, chunk.start)
        for live, chunk, first in zip(lives, batch.chunks, batch.first_rows, strict=True)
        if live.request.capture is not None
    )


def _stopping() -> MoesaicError:
    return Unavailable("the router is stopping", reason="STOPPING", retry_after_s=1.0)
