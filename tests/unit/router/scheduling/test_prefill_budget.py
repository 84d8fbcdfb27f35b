"""How much of a prompt is read beside sequences that decode."""

from __future__ import annotations

import pytest

from router.scheduling.block_pool import BlockPool
from router.scheduling.prefill_budget import MIN_CHUNK, PrefillBudget
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.sequence import Sequence


class Machine:
    """Steps that take a fixed time, a time per decoding sequence and a time per prompt token."""

    def __init__(self, *, fixed_s: float, decode_s: float, prompt_s: float) -> None:
        self.fixed_s, self.decode_s, self.prompt_s = fixed_s, decode_s, prompt_s

    def seconds(self, num_decoding: int, num_prompt_tokens: int) -> float:
        return self.fixed_s + self.decode_s * num_decoding + self.prompt_s * num_prompt_tokens


def learn(prefill: PrefillBudget, machine: Machine, *steps: tuple[int, int]) -> None:
    for num_decoding, num_prompt_tokens in steps:
        prefill.observe(num_decoding, num_prompt_tokens, machine.seconds(num_decoding, num_prompt_tokens))


def test_with_nobody_to_disturb_a_step_is_full() -> None:
    assert PrefillBudget(max_batch_tokens=512, max_stall=1.8).tokens(0) == 512


def test_before_anything_is_known_a_prompt_is_read_in_the_smallest_chunks() -> None:
    prefill = PrefillBudget(max_batch_tokens=512, max_stall=1.8)
    assert prefill.tokens(8) == MIN_CHUNK
    assert prefill.tokens(510) == 2


def test_a_mixed_step_takes_what_it_may_and_no_more() -> None:
    prefill, machine = (
        PrefillBudget(max_batch_tokens=512, max_stall=1.8),
        Machine(fixed_s=0.06, decode_s=0.005, prompt_s=0.001),
    )
    learn(prefill, machine, *[(8, 0)] * 5, (0, 512))
    for _ in range(20):
        learn(prefill, machine, (8, prefill.tokens(8)))
    stalled = machine.seconds(8, prefill.tokens(8)) / machine.seconds(8, 0)
    assert 1.7 < stalled <= 1.8


def test_the_more_wait_for_few_the_larger_the_chunks() -> None:
    prefill, machine = (
        PrefillBudget(max_batch_tokens=512, max_stall=1.8),
        Machine(fixed_s=0.06, decode_s=0.005, prompt_s=0.001),
    )
    learn(prefill, machine, *[(8, 0)] * 5, (0, 512))
    for _ in range(20):
        learn(prefill, machine, (8, prefill.tokens(8)))
    calm = prefill.tokens(8)
    assert prefill.tokens(8, num_unread=1) == calm
    assert calm < prefill.tokens(8, num_unread=4) < prefill.tokens(8, num_unread=8)
    assert prefill.tokens(8, num_unread=56) == 504


def test_a_first_step_price_that_hides_a_fixed_cost_is_corrected_soon() -> None:
    prefill = PrefillBudget(max_batch_tokens=512, max_stall=1.8)
    for _ in range(5):
        prefill.observe(8, 0, 0.1)
    prefill.observe(0, 512, 0.2)  # cheap: a prompt alone
    for _ in range(6):
        budget = prefill.tokens(8)
        prefill.observe(8, budget, 0.1 + 0.04 + 0.0005 * budget)  # beside others it costs more to begin with
    budget = prefill.tokens(8)
    assert 0.1 + 0.04 + 0.0005 * budget == pytest.approx(0.18, rel=0.1)


def test_an_expensive_prompt_is_still_read_in_chunks_worth_a_place() -> None:
    prefill, machine = (
        PrefillBudget(max_batch_tokens=512, max_stall=1.1),
        Machine(fixed_s=0.01, decode_s=0.0, prompt_s=0.1),
    )
    learn(prefill, machine, (4, 0), (4, 16))
    assert prefill.tokens(4) == MIN_CHUNK


def test_a_cheap_prompt_never_fills_more_than_the_batch() -> None:
    prefill, machine = (
        PrefillBudget(max_batch_tokens=512, max_stall=1.8),
        Machine(fixed_s=1.0, decode_s=0.0, prompt_s=1e-6),
    )
    learn(prefill, machine, (4, 0), (4, 16), (4, 16))
    assert prefill.tokens(4) == 508


def test_one_slow_step_does_not_stop_the_reading() -> None:
    prefill, machine = (
        PrefillBudget(max_batch_tokens=512, max_stall=1.8),
        Machine(fixed_s=0.1, decode_s=0.0, prompt_s=0.001),
    )
    learn(prefill, machine, *[(8, 0)] * 5, *[(8, 64)] * 10)
    before = prefill.tokens(8)
    prefill.observe(8, 64, 30.0)
    assert prefill.tokens(8) >= before // 2
    prefill.observe(8, 0, 30.0)
    assert prefill.tokens(8) <= before


def test_where_nothing_ever_decoded_alone_the_rest_of_a_mixed_step_is_taken_for_it() -> None:
    prefill, machine = (
        PrefillBudget(max_batch_tokens=512, max_stall=1.8),
        Machine(fixed_s=0.1, decode_s=0.0, prompt_s=0.001),
    )
    prefill.observe(0, 512, 0.512)
    learn(prefill, machine, (1, 16))
    assert prefill.tokens(1) == 80


def test_the_scheduler_keeps_to_it_and_reads_all_it_can_when_nobody_decodes() -> None:
    scheduler = Scheduler(
        Limits(64, 8), BlockPool(128, 4), prefill_budget=PrefillBudget(max_batch_tokens=64, max_stall=1.5)
    )

    def step() -> dict[str, int]:
        chunks = scheduler.schedule()
        for chunk in chunks:
            ends = chunk.reaches_end
            scheduler.advance(chunk)
            if ends:
                chunk.sequence.append(0)
        prompt_tokens = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        scheduler.observe(chunks, 0.1 + 0.001 * prompt_tokens)
        return {chunk.sequence.sequence_id: chunk.num_tokens for chunk in chunks}

    scheduler.add(Sequence("a", [0] * 64, 64))
    assert step() == {"a": 64}
    assert step() == {"a": 1}
    scheduler.add(Sequence("b", [0] * 100, 100))
    first = step()
    assert first["a"] == 1 and MIN_CHUNK <= first["b"] < 64
    for _ in range(12):
        step()
    scheduler.add(Sequence("c", [0] * 100, 100))
    assert step()["c"] in range(32, 51)
