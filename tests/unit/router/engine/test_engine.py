"""The engine's loop with a model that counts: the next token is the sum of a sequence's tokens, modulo the vocabulary.

Any mistake in packing, positions, preemption or bookkeeping changes the sum, and with it the text.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from support.engine_events import collect
from support.fake_links import make_epoch, make_pool
from support.views import plain_view

from moesaic.epoch import Epoch
from moesaic.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    InternalError,
    MoesaicError,
    Overloaded,
    Unavailable,
)
from moesaic.families.model import Attention
from router.attention.views import AttentionLayout
from router.cache.kv_cache import Contexts, KVCache
from router.decoders.decoder import MicroBatch, RouterModel
from router.dispatch.dispatcher import Dispatcher, DispatchRules
from router.engine.engine import Engine
from router.engine.request import (
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    SequenceEvent,
    SequenceRequest,
    Started,
    TokenGenerated,
)
from router.engine.sampling_params import SamplingParams
from router.gating.model_view import ModelView
from router.phase_clock import PhaseClock
from router.scheduling.admission import DEADLINE_UNREACHABLE, QUEUE_FULL, Admission, AdmissionLimits
from router.scheduling.block_pool import BlockPool
from router.scheduling.pace import Pace, PaceMeter
from router.scheduling.prefill_budget import PrefillBudget
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.scheduler import Limits, Scheduler

VOCABULARY = 50
WAIT_S = 60.0


class CountingModel:
    """Keeps each token id in the cache, so that the sum over a context is what its blocks really hold."""

    mixers = (Attention(num_heads=1, num_kv_heads=1, head_dim=1),)
    layout = AttentionLayout.of(mixers, block_tokens=4, device=torch.device("cpu"), dtype=torch.float32)

    def __init__(self) -> None:
        self.on_forward: Callable[[MicroBatch], None] = lambda part: None

    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        return torch.cat([self._forward(part, cache) for part in parts])

    def _forward(self, part: MicroBatch, cache: KVCache) -> torch.Tensor:
        self.on_forward(part)
        batch = part.batch
        cache.write(0, batch.cache_positions, batch.token_ids[0].float()[:, None].expand(-1, 2))
        sums = torch.empty(batch.num_tokens)
        for chunk, first_row in zip(batch.chunks, batch.first_rows, strict=True):
            blocks = torch.tensor(chunk.sequence.blocks)
            stored, _ = cache.read(0, Contexts(1, len(blocks), blocks), slice(0, chunk.end))
            sums[first_row : first_row + chunk.num_tokens] = stored.flatten().cumsum(0)[chunk.start :]
        return torch.nn.functional.one_hot(sums[part.rows].long() % VOCABULARY, VOCABULARY).float()


def expected_tokens(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % VOCABULARY)
    return tokens[len(prompt) :]


class Harness:
    """An engine over the counting model, and what its sequences reported."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        limits: Limits | None = None,
        max_waiting: int = 64,
        overlap: bool = False,
        missing_wait_s: float = WAIT_S,
        meter: PaceMeter | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = now
        self.max_waiting = max_waiting
        self.model = CountingModel()
        self.blocks = BlockPool(num_blocks, 4)
        self.scheduler = Scheduler(
            limits or Limits(max_batch_tokens=16, max_running=8),
            self.blocks,
            prefixes=PrefixCache(self.blocks),
        )
        epoch = make_epoch(1, 2)
        self.view = plain_view(epoch)
        pool, _ = make_pool(epoch, {"a": range(2)})
        self.dispatcher = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0))
        self.engine = Engine(
            cast(RouterModel, self.model),
            KVCache(
                self.model.mixers,
                num_blocks=num_blocks,
                block_tokens=4,
                dtype=torch.float32,
                device=torch.device("cpu"),
            ),
            self.scheduler,
            self.dispatcher,
            PhaseClock(),
            overlap=overlap,
            admission=Admission(
                AdmissionLimits(self.scheduler.limits.max_running, max_waiting),
                meter or PaceMeter(PrefillBudget(max_batch_tokens=16, max_stall=1.8)),
            ),
            missing_wait_s=missing_wait_s,
            now=now,
        )

    def submit(
        self,
        name: str,
        prompt: tuple[int, ...],
        *,
        timeout_s: float = WAIT_S,
        tenant: str = "",
        view: ModelView | None = None,
        **sampling: Any,
    ) -> queue.SimpleQueue[SequenceEvent]:
        events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
        deadline_s = self.now() + timeout_s
        self.engine.submit(
            SequenceRequest(name, prompt, params, deadline_s, events.put, view or self.view, tenant=tenant)
        )
        return events


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.engine.stop(WAIT_S)


def test_many_sequences_at_once_get_what_each_gets_alone(harness: Harness) -> None:
    prompts = [tuple(range(1, 2 + index)) for index in range(20)]
    waiting = [harness.submit(str(i), prompt) for i, prompt in enumerate(prompts)]
    harness.engine.start()
    for prompt, events in zip(prompts, waiting, strict=True):
        tokens, end = collect(events)
        assert tokens == expected_tokens(prompt, 8)
        assert isinstance(end, Finished) and end.reason is FinishReason.LENGTH


def test_sequences_that_do_not_fit_together_are_preempted_and_still_exact() -> None:
    harness = Harness(num_blocks=6, limits=Limits(max_batch_tokens=64, max_running=8))
    prompts = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    waiting = [harness.submit(str(i), prompt, max_tokens=16) for i, prompt in enumerate(prompts)]
    harness.engine.start()
    for prompt, events in zip(prompts, waiting, strict=True):
        assert collect(events)[0] == expected_tokens(prompt, 16)
    assert harness.engine.stats().preemptions > 0
    harness.engine.stop(WAIT_S)
    assert harness.blocks.num_used == 0


def test_a_stop_token_is_reported_and_ends_the_sequence(harness: Harness) -> None:
    stop = expected_tokens((3, 4), 3)[2]
    events = harness.submit("a", (3, 4), stop_token_ids=frozenset({stop}))
    harness.engine.start()
    tokens, end = collect(events)
    assert tokens == expected_tokens((3, 4), 3)
    assert isinstance(end, Finished) and (end.reason, end.stop_token_id) == (FinishReason.STOP, stop)


def test_the_prompt_is_scored_once_even_in_chunks(harness: Harness) -> None:
    prompt = tuple(range(1, 40))  # longer than a batch
    events = harness.submit("a", prompt, max_tokens=0, prompt_logprobs=1)
    harness.engine.start()
    assert isinstance(events.get(timeout=WAIT_S), Started)
    scored = events.get(timeout=WAIT_S)
    assert isinstance(scored, PromptScored)
    assert [entry.token_id for entry in scored.logprobs] == list(prompt[1:])
    assert [entry.top[0][0] for entry in scored.logprobs] == [
        sum(prompt[:n]) % VOCABULARY for n in range(1, len(prompt))
    ]
    assert isinstance(events.get(timeout=WAIT_S), Finished)


def test_a_cancelled_sequence_frees_its_blocks_and_says_nothing_more(harness: Harness) -> None:
    running, release = threading.Event(), threading.Event()

    def hold(part: MicroBatch) -> None:
        running.set()
        release.wait(WAIT_S)

    harness.model.on_forward = hold
    events = harness.submit("a", (1, 2), max_tokens=1000)
    other = harness.submit("b", (1, 2))
    harness.engine.start()
    assert running.wait(WAIT_S)
    harness.engine.cancel("a")
    release.set()
    collect(other)
    harness.engine.stop(WAIT_S)
    heard = []
    while not events.empty():
        heard.append(events.get())
    assert all(isinstance(event, Started | TokenGenerated) for event in heard)
    assert harness.blocks.num_used == 0 and harness.engine.num_open == 0


def test_a_paused_sequence_gives_its_place_to_others_and_goes_on_where_it_was() -> None:
    harness = Harness(limits=Limits(max_batch_tokens=16, max_running=1))
    reached, release = threading.Event(), threading.Event()

    def hold(part: MicroBatch) -> None:
        if part.batch.chunks[0].end == 6:
            reached.set()
            release.wait(WAIT_S)

    harness.model.on_forward = hold
    events = harness.submit("a", (1, 2), max_tokens=20)
    other = harness.submit("b", (3,), max_tokens=30)
    harness.engine.start()
    assert reached.wait(WAIT_S)
    harness.engine.pause("a")
    harness.engine.pause("nobody")
    release.set()
    assert collect(other)[0] == expected_tokens((3,), 30)
    assert harness.engine.stats().running == harness.engine.stats().waiting == harness.blocks.num_used == 0
    harness.engine.resume("a")
    assert collect(events)[0] == expected_tokens((1, 2), 20)
    harness.engine.stop(WAIT_S)


def test_a_paused_sequence_ends_at_its_deadline_when_it_is_cancelled_and_when_the_engine_stops(
    harness: Harness,
) -> None:
    release = threading.Event()
    harness.model.on_forward = lambda part: release.wait(WAIT_S) and None
    late = harness.submit("late", (1,), max_tokens=1000, timeout_s=0.3)
    cancelled = harness.submit("cancelled", (2,), max_tokens=1000)
    last = harness.submit("last", (3,), max_tokens=1000)
    harness.engine.start()
    for name in ("late", "cancelled", "last"):
        harness.engine.pause(name)
    harness.engine.cancel("cancelled")
    release.set()
    _, end = collect(late)
    assert isinstance(end, Failed) and isinstance(end.error, DeadlineExceeded)
    harness.engine.stop(WAIT_S)
    _, end = collect(last)
    assert isinstance(end, Failed) and isinstance(end.error, Unavailable)
    assert cancelled.empty() or not isinstance(cancelled.get(), Failed)
    assert harness.engine.num_open == harness.blocks.num_used == 0


def test_a_passed_deadline_ends_a_sequence_with_its_own_error(harness: Harness) -> None:
    late = harness.submit("late", (1,), timeout_s=-1.0)
    good = harness.submit("good", (2, 3))
    harness.engine.start()
    _, end = collect(late)
    assert isinstance(end, Failed) and isinstance(end.error, DeadlineExceeded)
    assert collect(good)[0] == expected_tokens((2, 3), 8)


def test_one_more_than_the_queue_holds_is_refused_with_a_time_to_retry() -> None:
    harness = Harness(limits=Limits(16, 1), max_waiting=1)
    harness.submit("a", (1,))
    harness.submit("b", (1,))
    with pytest.raises(Overloaded) as refused:
        harness.submit("c", (1,))
    assert refused.value.retry_after_s


class KnownPace(PaceMeter):
    """A meter that need not measure."""

    def __init__(self) -> None:
        super().__init__(PrefillBudget(max_batch_tokens=16, max_stall=1.8))

    def pace(self) -> Pace:
        return Pace(prompt_token_s=0.5, output_token_s=1.0, step_s=1.0, usual_answer=4, longest_answer=8)


class OnePlace:
    """An engine with one place, whose pace is known, and that holds still in a step for "first"."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.harness = Harness(limits=Limits(16, 1), meter=KnownPace(), now=lambda: self.now_s)
        self.release = threading.Event()
        self.computed: set[str] = set()
        self.harness.engine.start()
        collect(self.harness.submit("earlier", (1,), timeout_s=1e6))
        reached = threading.Event()

        def hold(part: MicroBatch) -> None:
            self.computed |= {chunk.sequence.sequence_id for chunk in part.batch.chunks}
            reached.set()
            self.release.wait(WAIT_S)

        self.harness.model.on_forward = hold
        self.first = self.harness.submit("first", (1, 2), timeout_s=1e6, max_tokens=8)
        assert reached.wait(WAIT_S)

    @property
    def refusals(self) -> Mapping[str, int]:
        return self.harness.engine.stats().refusals


@pytest.fixture
def one_place() -> Iterator[OnePlace]:
    made = OnePlace()
    yield made
    made.release.set()
    made.harness.engine.stop(WAIT_S)


def test_a_refusal_waits_for_no_step_and_names_what_is_predicted(one_place: OnePlace) -> None:
    with pytest.raises(Overloaded) as refused:
        one_place.harness.submit("late", (1, 2), timeout_s=5.0)
    # The prompts of the first and of its own, the turn of the first, and an answer of its own.
    assert refused.value.message == (
        "the answer is predicted to take 14.0 s, 5.0 s are left until the deadline"
    )
    assert (refused.value.reason, refused.value.retry_after_s) == (DEADLINE_UNREACHABLE, 9.0)
    with pytest.raises(Overloaded) as refused:
        for number in range(one_place.harness.max_waiting + 1):
            one_place.harness.submit(str(number), (1,), timeout_s=1e6)
    assert refused.value.reason == QUEUE_FULL
    assert one_place.refusals == {DEADLINE_UNREACHABLE: 1, QUEUE_FULL: 1}


def test_a_sequence_that_can_no_longer_be_in_time_is_shed_before_anything_is_computed(
    one_place: OnePlace,
) -> None:
    late = one_place.harness.submit("late", (1, 2), timeout_s=20.0)
    good = one_place.harness.submit("good", (3,), timeout_s=1e6)
    one_place.now_s = 12.0  # eight seconds are left, nine are needed
    one_place.release.set()
    event = late.get(timeout=WAIT_S)
    assert isinstance(event, Failed) and isinstance(event.error, Overloaded)
    assert event.error.reason == DEADLINE_UNREACHABLE
    assert collect(one_place.first)[0] == expected_tokens((1, 2), 8)
    assert collect(good)[0] == expected_tokens((3,), 8)
    assert one_place.computed == {"first", "good"} and late.empty()
    assert one_place.refusals == {DEADLINE_UNREACHABLE: 1}


def test_tokens_that_lack_an_expert_fail_their_own_sequence_only(harness: Harness) -> None:
    lost: MoesaicError = Unavailable("layer 0: an expert worker failed")

    def lose_the_first(part: MicroBatch) -> None:
        for chunk, row in zip(part.batch.chunks, part.batch.first_rows, strict=True):
            if chunk.sequence.sequence_id == "unlucky":
                part.experts.failed[row] = lost

    harness.model.on_forward = lose_the_first
    unlucky, lucky = harness.submit("unlucky", (1, 2)), harness.submit("lucky", (3, 4))
    harness.engine.start()
    tokens, end = collect(unlucky)
    assert tokens == [] and isinstance(end, Failed) and end.error is lost
    assert collect(lucky)[0] == expected_tokens((3, 4), 8)


def test_an_unexpected_error_fails_its_batch_and_the_loop_goes_on(harness: Harness) -> None:
    def fail_once(part: MicroBatch) -> None:
        harness.model.on_forward = lambda part: None
        raise RuntimeError("a bug")

    harness.model.on_forward = fail_once
    events = harness.submit("a", (1, 2))
    harness.engine.start()
    _, end = collect(events)
    assert isinstance(end, Failed) and isinstance(end.error, InternalError)
    assert collect(harness.submit("b", (1, 2)))[0] == expected_tokens((1, 2), 8)


def test_an_engine_that_dies_says_so_and_answers_whoever_waits(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down() -> None:
        raise RuntimeError("a bug outside a step")

    monkeypatch.setattr(harness.scheduler, "schedule", break_down)
    events = harness.submit("a", (1,))
    harness.engine.start()
    _, end = collect(events)
    assert isinstance(end, Failed) and isinstance(end.error, Unavailable)
    harness.engine.stop(WAIT_S)
    assert not harness.engine.alive
    assert "the engine died" in caplog.text
    with pytest.raises(Unavailable):
        harness.submit("b", (1,))


def test_stopping_answers_everybody_and_admits_nobody(harness: Harness) -> None:
    events = harness.submit("a", (1,), max_tokens=100_000)
    harness.engine.start()
    harness.engine.stop(WAIT_S)
    _, end = collect(events)
    assert isinstance(end, Failed) and isinstance(end.error, Unavailable)
    with pytest.raises(Unavailable):
        harness.submit("b", (1,))


def test_a_prompt_that_was_read_before_is_not_read_again_and_says_so(harness: Harness) -> None:
    prompt = tuple(range(1, 12))
    harness.engine.start()
    first = harness.submit("a", prompt)
    assert first.get(timeout=WAIT_S) == Started(pytest.approx(0, abs=WAIT_S), 0)
    assert collect(first)[0] == expected_tokens(prompt, 8)
    second = harness.submit("b", prompt)
    assert second.get(timeout=WAIT_S) == Started(pytest.approx(0, abs=WAIT_S), 8)
    assert collect(second)[0] == expected_tokens(prompt, 8)
    stats = harness.engine.stats()
    assert (stats.prefix_lookup_tokens, stats.prefix_hit_tokens) == (22, 8)
    assert stats.prompt_tokens == 11 + 3


def test_a_step_that_lacks_an_expert_leaves_nothing_in_the_cache(harness: Harness) -> None:
    prompt = tuple(range(1, 12))

    def lose_the_last(part: MicroBatch) -> None:
        part.experts.failed[part.batch.num_tokens - 1] = Unavailable("layer 0: an expert worker failed")

    harness.model.on_forward = lose_the_last
    harness.engine.start()
    _, end = collect(harness.submit("a", prompt))
    assert isinstance(end, Failed)
    harness.model.on_forward = lambda part: None
    assert collect(harness.submit("b", prompt))[0] == expected_tokens(prompt, 8)
    assert harness.engine.stats().prefix_hit_tokens == 0


def test_values_that_are_not_finite_are_not_found_by_anybody_else(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tuple(range(1, 12))
    forward = harness.model.forward
    monkeypatch.setattr(harness.model, "forward", lambda *args: forward(*args) * torch.nan)
    harness.engine.start()
    _, end = collect(harness.submit("a", prompt))
    assert isinstance(end, Failed) and isinstance(end.error, DataLoss)
    monkeypatch.undo()
    assert collect(harness.submit("b", prompt))[0] == expected_tokens(prompt, 8)
    assert harness.engine.stats().prefix_hit_tokens == 0


def test_two_micro_batches_give_what_one_gives() -> None:
    harness = Harness(overlap=True)
    prompts = [tuple(range(1, 2 + 3 * index)) for index in range(12)]
    waiting = [harness.submit(str(i), prompt) for i, prompt in enumerate(prompts)]
    scored = harness.submit("scored", tuple(range(1, 40)), max_tokens=2, prompt_logprobs=0)
    harness.engine.start()
    for prompt, events in zip(prompts, waiting, strict=True):
        assert collect(events)[0] == expected_tokens(prompt, 8)
    assert isinstance(scored.get(timeout=WAIT_S), Started)
    scores = scored.get(timeout=WAIT_S)
    assert isinstance(scores, PromptScored)
    assert [entry.token_id for entry in scores.logprobs] == list(range(2, 40))
    assert collect(scored)[0] == expected_tokens(tuple(range(1, 40)), 2)
    assert harness.engine.stats().overlapped_steps > 0
    harness.engine.stop(WAIT_S)
    assert harness.blocks.num_used == 0


@pytest.mark.parametrize("part_number", [0, 1])
def test_a_prompt_that_was_cut_in_two_fails_once_whichever_part_lacks_an_expert(part_number: int) -> None:
    harness = Harness(overlap=True)
    parts: list[MicroBatch] = []

    def lose_one(part: MicroBatch) -> None:
        parts.append(part)
        if len(parts) - 1 == part_number:
            part.experts.failed[0] = Unavailable("layer 0: an expert worker failed")

    harness.model.on_forward = lose_one
    events = harness.submit("a", tuple(range(1, 12)))
    harness.engine.start()
    _, end = collect(events)
    harness.engine.stop(WAIT_S)
    assert isinstance(end, Failed) and isinstance(end.error, Unavailable)
    assert events.empty() and harness.blocks.num_used == 0


def other_epoch() -> ModelView:
    versions = make_epoch(1, 2).versions
    return plain_view(Epoch.of("tiny", dict.fromkeys(versions, b"other!!!" * 4)))


@pytest.mark.parametrize("overlap", [False, True])
def test_sequences_of_several_views_share_steps_and_those_of_one_lie_together(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    views = [harness.view, other_epoch(), replace(harness.view, key="policy")]
    seen: list[list[tuple[str, int, int]]] = []

    def note(part: MicroBatch) -> None:
        seen.append([(run.view.key, run.start, run.end) for run in part.views])
        for run in part.views:
            rows = range(run.start, run.end)
            for chunk, first in zip(part.batch.chunks, part.batch.first_rows, strict=True):
                if chunk.sequence.view == run.view.key:
                    assert first in rows and first + chunk.num_tokens - 1 in rows
        assert [run.start for run in part.views[1:]] == [run.end for run in part.views[:-1]]
        assert (part.views[0].start, part.views[-1].end) == (0, part.batch.num_tokens)

    harness.model.on_forward = note
    waiting = [harness.submit(str(i), (i, 2, 3), view=views[i % 3], max_tokens=6) for i in range(6)]
    harness.engine.start()
    for index, events in enumerate(waiting):
        assert collect(events)[0] == expected_tokens((index, 2, 3), 6)
    harness.engine.stop(WAIT_S)
    assert max(len(runs) for runs in seen) == (2 if overlap else 3)
    assert all(len({key for key, _, _ in runs}) == len(runs) for runs in seen)


def test_a_prefix_is_found_neither_in_another_epoch_nor_under_another_policy(harness: Harness) -> None:
    prompt = tuple(range(1, 14))
    harness.engine.start()
    for view, num_cached in (
        (harness.view, 0),
        (other_epoch(), 0),
        (replace(harness.view, key="policy"), 0),
        (harness.view, 12),
    ):
        events = harness.submit("a", prompt, view=view, max_tokens=1)
        started = events.get(timeout=WAIT_S)
        assert isinstance(started, Started) and started.num_cached == num_cached
        collect(events)
    harness.engine.stop(WAIT_S)


def test_a_retired_epoch_ends_its_sequences_with_their_offset_and_no_others(harness: Harness) -> None:
    reached, release = threading.Event(), threading.Event()

    def hold(part: MicroBatch) -> None:
        if any(len(chunk.sequence.output) == 3 for chunk in part.batch.chunks):
            reached.set()
            release.wait(WAIT_S)

    harness.model.on_forward = hold
    other = other_epoch()
    retired, paused = (harness.submit(name, (1, 2), view=other, max_tokens=500) for name in ("a", "paused"))
    staying = harness.submit("b", (1, 2), max_tokens=8)
    harness.engine.pause("paused")
    harness.engine.start()
    assert reached.wait(WAIT_S)
    assert harness.engine.open_sequences() == {other.epoch.id: 2, harness.view.epoch.id: 1}
    harness.engine.retire(other.epoch.id)
    harness.engine.retire("nobody's")
    release.set()
    tokens, end = collect(retired)
    assert isinstance(end, Failed) and isinstance(end.error, Aborted) and end.error.reason == "epoch_retired"
    assert f"after {len(tokens)} tokens" in end.error.message
    assert isinstance(collect(paused)[1], Failed)
    assert collect(staying)[0] == expected_tokens((1, 2), 8)
    harness.engine.stop(WAIT_S)
    assert harness.engine.open_sequences() == {} and harness.blocks.num_used == 0


def test_each_epoch_has_figures_of_its_own(harness: Harness) -> None:
    other = other_epoch()
    harness.engine.start()
    collect(harness.submit("a", (1, 2), max_tokens=5))
    collect(harness.submit("b", (1, 2), view=other, timeout_s=0.0))
    harness.engine.stop(WAIT_S)
    tallies = harness.engine.tallies()
    own, others = tallies[harness.view.epoch.id], tallies[other.epoch.id]
    assert (own.finished, own.failed, len(own.first_token_s), len(own.token_s)) == (1, 0, 1, 4)
    assert (others.finished, others.failed, others.not_finite) == (0, 1, 0)


def test_preempted_sequences_of_several_tenants_are_exact_beside_what_is_cached() -> None:
    harness = Harness(num_blocks=8, limits=Limits(max_batch_tokens=16, max_running=8))
    prompts = [(1, 2, 3, 4, 5, index % 2) for index in range(8)]
    harness.engine.start()
    waiting = [
        harness.submit(str(i), prompt, tenant="ab"[i % 2], max_tokens=16) for i, prompt in enumerate(prompts)
    ]
    for prompt, events in zip(prompts, waiting, strict=True):
        assert collect(events)[0] == expected_tokens(prompt, 16)
    assert harness.engine.stats().preemptions > 0
    harness.engine.stop(WAIT_S)
    assert harness.blocks.num_used == 0
    harness.scheduler.check_integrity()
