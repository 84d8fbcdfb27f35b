"""The loop of a router: take what came in, choose a batch, run it, sample, report. One thread owns all of it.

Callers of other threads only put commands into an inbox. Every sequence ends with exactly one Finished or Failed, or
silently when it was cancelled; whatever the end, its KV blocks are free at once.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass

import torch
from opentelemetry import trace
from opentelemetry.context import Context

from moesaic.errors import DeadlineExceeded, InternalError, MoesaicError, Overloaded, Unavailable
from moesaic.manifest import Epoch
from router import sampler
from router.batch import PackedBatch, pack
from router.dispatcher import Dispatcher, DispatchStep
from router.kv_cache import BlockPool, KVCache
from router.live import LiveSequence, Reading
from router.model import MicroBatch, RouterModel
from router.phases import INSIDE_FORWARD, PhaseClock
from router.scheduler import Chunk, Limits, Scheduler
from router.sequence import Failed, Finished, SampledToken, SequenceRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the state of the queues."""

    steps: int
    prompt_tokens: int
    generated_tokens: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class _Cancel:
    sequence_id: str


class Engine:
    """Runs the sequences of one epoch on one model."""

    def __init__(
        self,
        model: RouterModel,
        cache: KVCache,
        pool: BlockPool,
        dispatcher: Dispatcher,
        clock: PhaseClock,
        *,
        epoch: Epoch,
        limits: Limits,
        max_waiting: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._pool = pool
        self._dispatcher = dispatcher
        self._clock = clock
        self._epoch = epoch
        self._max_open = limits.max_running + max_waiting
        self._scheduler = Scheduler(limits, pool)
        self._live: dict[str, LiveSequence] = {}
        # Bounded by `_max_open`: whoever is not admitted puts nothing in.
        self._inbox: queue.SimpleQueue[SequenceRequest | _Cancel | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_open = 0
        self._stopping = False
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_open(self) -> int:
        """Sequences that were submitted and have not ended."""
        return self._num_open

    def submit(self, request: SequenceRequest) -> str:
        """Admits a sequence and returns the epoch it is pinned to. Raises Overloaded or Unavailable. Thread-safe."""
        with self._lock:
            if self._stopping:
                raise _stopping()
            if self._num_open >= self._max_open:
                raise Overloaded(
                    f"the router has its {self._max_open} sequences running or waiting",
                    reason="QUEUE_FULL",
                    retry_after_s=1.0,
                )
            self._num_open += 1
            self._inbox.put(request)
        return self._epoch.id

    def cancel(self, sequence_id: str) -> None:
        """Ends a sequence without further events, if it is still there. Thread-safe."""
        self._inbox.put(_Cancel(sequence_id))

    def stop(self, timeout_s: float) -> None:
        """Fails what is still running and ends the thread."""
        with self._lock:
            self._stopping = True
            self._inbox.put(None)
        self._thread.join(timeout_s)

    def stats(self) -> EngineStats:
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._pool.num_used,
            kv_blocks_total=self._pool.num_blocks,
            preemptions=self._scheduler.num_preemptions,
        )

    def _loop(self) -> None:
        try:
            while self._take_commands():
                started = time.perf_counter()
                self._expire()
                chunks = self._scheduler.schedule()
                self._clock.add("schedule", time.perf_counter() - started)
                if chunks:
                    self._step(chunks)
                if not self._live:
                    self._scheduler.check_integrity()
        except Exception:
            # Outside a step only a bug comes here: health turns false, and whoever waits is told below.
            log.exception("the engine died")
        finally:
            self._abandon()

    def _take_commands(self) -> bool:
        """Empties the inbox; blocks while there is nothing to run. False: stop."""
        while not self._live or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return False
            if isinstance(command, SequenceRequest):
                live = LiveSequence(command)
                self._live[command.sequence_id] = live
                self._scheduler.add(live.sequence)
            elif live_sequence := self._live.get(command.sequence_id):
                self._end(live_sequence)
        return True

    def _expire(self) -> None:
        now = time.monotonic()
        for live in [live for live in self._live.values() if live.request.deadline_s <= now]:
            self._fail(live, DeadlineExceeded(f"deadline passed after {len(live.sequence.output)} tokens"))

    def _step(self, chunks: tuple[Chunk, ...]) -> None:
        """One batch: forward, then what each sequence gets from it. An unexpected error fails this batch alone."""
        lives = [self._live[chunk.sequence.sequence_id] for chunk in chunks]
        try:
            batch = pack(
                chunks,
                block_tokens=self._pool.block_tokens,
                window=self._model.window,
                device=self._model.device,
            )
            readings = [
                live.read(chunk, first_row)
                for live, chunk, first_row in zip(lives, chunks, batch.first_rows, strict=True)
            ]
            started = time.perf_counter()
            experts, logits = self._forward(batch, readings)
            self._deliver(self._whole(readings, experts), logits)
            self._scheduler.observe(chunks, time.perf_counter() - started)
        except Exception:
            log.exception("a step failed")
            for live in lives:
                self._fail(live, InternalError("internal error"))
        self._steps += 1

    def _forward(
        self, batch: PackedBatch, readings: list[Reading]
    ) -> tuple[DispatchStep, dict[int, torch.Tensor]]:
        """Runs the model and gives the logits [V] of every wanted row."""
        for reading in readings:
            reading.live.note_step()
        experts = self._dispatcher.begin(
            self._epoch,
            deadline_s=max(reading.live.request.deadline_s for reading in readings),
            context=_traced(readings),
        )
        rows = [row for reading in readings for row in reading.wanted]
        started, inside_s = time.perf_counter(), self._clock.total(INSIDE_FORWARD)
        part = MicroBatch(batch, torch.tensor(rows, dtype=torch.long), experts)
        logits = self._model.forward((part,), self._cache)
        inside_s = self._clock.total(INSIDE_FORWARD) - inside_s
        self._clock.add("dense", time.perf_counter() - started - inside_s)
        return experts, dict(zip(rows, logits, strict=True))

    def _whole(self, readings: list[Reading], experts: DispatchStep) -> list[Reading]:
        """Fails the sequences for which an expert was missing; the others have their chunk in the cache now."""
        whole = []
        for reading in readings:
            error = next(
                (experts.failed[row] for row in reading.rows if row in experts.failed),
                None,
            )
            if error is not None:
                self._fail(reading.live, error)
                continue
            before = reading.live.sequence.num_prompt_tokens - reading.chunk.start
            self._prompt_tokens += max(0, min(reading.chunk.num_tokens, before))
            self._scheduler.advance(reading.chunk)
            whole.append(reading)
        return whole

    def _deliver(self, readings: list[Reading], logits: dict[int, torch.Tensor]) -> None:
        """Scores prompts, samples next tokens, reports them and ends what is finished."""
        started = time.perf_counter()
        readings = [reading for reading in readings if self._score(reading, logits)]
        drawing = [reading for reading in readings if reading.samples]
        tokens: list[SampledToken | MoesaicError] = []
        if drawing:
            tokens = sampler.sample(
                torch.stack([logits[reading.rows[-1]] for reading in drawing]),
                [reading.live.sampling for reading in drawing],
            )
        self._clock.add("sample", time.perf_counter() - started)
        started = time.perf_counter()
        for reading in readings:
            if reading.chunk.reaches_end:
                self._end_if(reading.live, reading.live.reach_end_of_prompt())
        for reading, token in zip(drawing, tokens, strict=True):
            if isinstance(token, MoesaicError):
                self._fail(reading.live, token)
            else:
                self._generated_tokens += 1
                self._end_if(reading.live, reading.live.take_token(token))
        self._clock.add("deliver", time.perf_counter() - started)

    def _score(self, reading: Reading, logits: dict[int, torch.Tensor]) -> bool:
        """Scores the prompt's tokens of a chunk, where they are wanted. False: it failed, and its sequence with it."""
        if not reading.scored:
            return True
        rows = torch.stack([logits[row] for row in reading.scored])
        num_top = reading.live.request.sampling.prompt_logprobs or 0
        try:
            reading.live.take_scores(sampler.score(rows, reading.targets, num_top))
        except MoesaicError as error:
            self._fail(reading.live, error)
            return False
        return True

    def _end_if(self, live: LiveSequence, finished: Finished | None) -> None:
        if finished is not None:
            self._end(live)
            live.request.on_event(finished)

    def _fail(self, live: LiveSequence, error: MoesaicError) -> None:
        self._end(live)
        live.request.on_event(Failed(error))

    def _end(self, live: LiveSequence) -> None:
        """Forgets a sequence; its blocks are free before anybody hears of its end."""
        if self._live.pop(live.request.sequence_id, None) is not None:
            self._scheduler.remove(live.sequence)
            with self._lock:
                self._num_open -= 1

    def _abandon(self) -> None:
        """Whatever is left when the loop ends gets an answer."""
        with self._lock:
            self._stopping = True
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, SequenceRequest):
                command.on_event(Failed(_stopping()))
        for live in list(self._live.values()):
            self._fail(live, _stopping())


def _stopping() -> MoesaicError:
    return Unavailable("the router is stopping", reason="STOPPING", retry_after_s=1.0)


def _traced(readings: list[Reading]) -> Context | None:
    """The first recorded trace of the batch: one set of spans for all its sequences, or none."""
    for reading in readings:
        context = reading.live.request.trace
        if context is not None and trace.get_current_span(context).is_recording():
            return context
    return None
