"""The engine's loop with a model that counts: the next token is the sum of a sequence's tokens, modulo the vocabulary.

Any mistake in packing, positions, preemption or bookkeeping changes the sum, and with it the text.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from support.fake_links import make_epoch, make_pool

from moesaic.errors import (
    DeadlineExceeded,
    InternalError,
    MoesaicError,
    Overloaded,
    Unavailable,
)
from router.dispatcher import Dispatcher
from router.engine import Engine
from router.kv_cache import BlockPool, KVCache
from router.model import MicroBatch, RouterModel
from router.phases import PhaseClock
from router.scheduler import Limits
from router.sequence import (
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    SamplingParams,
    SequenceEvent,
    SequenceRequest,
    Started,
    TokenGenerated,
)

VOCABULARY = 50
WAIT_S = 10.0


class CountingModel:
    """Keeps each token id in the cache, so that the sum over a context is what its blocks really hold."""

    window = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.on_forward: Callable[[MicroBatch], None] = lambda part: None

    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        return torch.cat([self._forward(part, cache) for part in parts])

    def _forward(self, part: MicroBatch, cache: KVCache) -> torch.Tensor:
        self.on_forward(part)
        batch = part.batch
        ids = batch.token_ids[0].float().view(-1, 1, 1)
        cache.write(0, batch.cache_positions, ids, ids)
        stored = cache.keys[0].flatten()
        sums = torch.empty(batch.num_tokens)
        if batch.decode is not None:
            sums[batch.decode.rows] = (stored[batch.decode.positions] * batch.decode.visible).sum(1)
        for chunk in batch.prefill:
            visible = stored[chunk.positions] * chunk.visible
            sums[chunk.first_row : chunk.first_row + chunk.num_tokens] = visible.sum(1)
        return torch.nn.functional.one_hot(sums[part.rows].long() % VOCABULARY, VOCABULARY).float()


def expected_tokens(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % VOCABULARY)
    return tokens[len(prompt) :]


class Harness:
    """An engine over the counting model, and what its sequences reported."""

    def __init__(self, *, num_blocks: int = 64, limits: Limits | None = None, max_waiting: int = 64) -> None:
        self.model = CountingModel()
        self.blocks = BlockPool(num_blocks, 4)
        epoch = make_epoch(1, 2)
        pool, _ = make_pool(epoch, {"a": range(2)})
        self.dispatcher = Dispatcher(pool, PhaseClock(), call_timeout_s=1.0)
        self.engine = Engine(
            cast(RouterModel, self.model),
            KVCache(
                num_layers=1,
                num_positions=num_blocks * 4,
                num_kv_heads=1,
                head_dim=1,
                dtype=torch.float32,
                device=torch.device("cpu"),
            ),
            self.blocks,
            self.dispatcher,
            PhaseClock(),
            epoch=epoch,
            limits=limits or Limits(max_batch_tokens=16, max_running=8),
            max_waiting=max_waiting,
        )

    def submit(
        self, name: str, prompt: tuple[int, ...], *, timeout_s: float = WAIT_S, **sampling: Any
    ) -> queue.SimpleQueue[SequenceEvent]:
        events: queue.SimpleQueue[SequenceEvent] = queue.SimpleQueue()
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
        self.engine.submit(SequenceRequest(name, prompt, params, time.monotonic() + timeout_s, events.put))
        return events


def collect(events: queue.SimpleQueue[SequenceEvent]) -> tuple[list[int], Finished | Failed]:
    """All tokens and the end of a sequence."""
    tokens = []
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, TokenGenerated):
            tokens.append(event.token.token_id)
        elif isinstance(event, Finished | Failed):
            return tokens, event


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

    monkeypatch.setattr(harness.engine._scheduler, "schedule", break_down)
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
