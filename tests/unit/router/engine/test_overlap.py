"""One micro-batch or two, by trial."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis import given

from router.engine.overlap import FIRST_PAUSE, MAX_LOSS, Overlap, halves
from router.scheduling.sequence import Chunk, Sequence

Seconds = Callable[[bool], float]


def run(overlap: Overlap, num_steps: int, seconds: Seconds, num_decoding: int = 16) -> list[bool]:
    """What each of some steps decided."""
    decisions = []
    for _ in range(num_steps):
        split = overlap.decide(num_decoding, 0)
        overlap.observe(num_decoding, 0, split=split, seconds=seconds(split))
        decisions.append(split)
    return decisions


def test_steps_do_not_split_until_a_trial_has_shown_a_reason() -> None:
    assert not any(run(Overlap(), FIRST_PAUSE, lambda split: 1.0))


def test_a_clear_and_sustained_win_splits() -> None:
    overlap = Overlap()
    run(overlap, 5000, lambda split: 0.7 if split else 1.0)
    assert sum(run(overlap, 100, lambda split: 0.7 if split else 1.0)) >= 95


def test_a_small_win_is_not_worth_a_change() -> None:
    overlap = Overlap()
    decisions = run(overlap, 5000, lambda split: 0.98 if split else 1.0)
    assert sum(decisions) < 0.2 * len(decisions)


def test_trials_that_lose_become_rare_and_cost_almost_nothing() -> None:
    overlap = Overlap()
    decisions = run(overlap, 20_000, lambda split: 1.9 if split else 1.0)
    assert 0.9 * sum(decisions) <= MAX_LOSS * 20_000
    assert sum(decisions[10_000:]) <= 1


def test_when_the_win_is_gone_it_goes_back() -> None:
    overlap = Overlap()
    run(overlap, 5000, lambda split: 0.7 if split else 1.0)
    run(overlap, 5000, lambda split: 1.5 if split else 1.0)
    assert sum(run(overlap, 100, lambda split: 1.5 if split else 1.0)) <= 5


def test_sizes_decide_for_themselves() -> None:
    overlap = Overlap()
    for _ in range(5000):
        run(overlap, 1, lambda split: 1.5 if split else 1.0, num_decoding=4)
        run(overlap, 1, lambda split: 0.7 if split else 1.0, num_decoding=64)
    assert sum(run(overlap, 100, lambda split: 1.0, num_decoding=4)) <= 5
    assert sum(run(overlap, 100, lambda split: 0.7 if split else 1.0, num_decoding=64)) >= 95


def test_a_single_token_is_never_split() -> None:
    assert not any(run(Overlap(), 1000, lambda split: 0.1 if split else 1.0, num_decoding=1))


def test_a_trial_waits_for_a_step_that_compares() -> None:
    overlap = Overlap()
    sizes = [16, 24]  # of one size by powers of two, but not alike
    for step in range(1000):
        num_decoding = sizes[step % 2]
        assert not overlap.decide(num_decoding, 0)
        overlap.observe(num_decoding, 0, split=False, seconds=1.0)


def make_chunks(*num_tokens: int) -> tuple[Chunk, ...]:
    return tuple(
        Chunk(Sequence(str(index), [0] * (num + 3), num + 3), 3, num) for index, num in enumerate(num_tokens)
    )


def test_a_long_chunk_is_cut_in_two_and_keeps_its_order() -> None:
    (chunk,) = make_chunks(9)
    (first,), (second,) = halves((chunk,))
    assert (first.start, first.num_tokens) == (3, 4)
    assert (second.start, second.num_tokens) == (7, 5)
    assert not first.reaches_end and second.reaches_end


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda counts: sum(counts) >= 2))
def test_halves_hold_every_token_once_in_order_and_about_equally(counts: list[int]) -> None:
    chunks = make_chunks(*counts)
    first, second = halves(chunks)
    tokens = [
        (chunk.sequence.sequence_id, position)
        for chunk in (*first, *second)
        for position in range(chunk.start, chunk.end)
    ]
    assert tokens == [
        (chunk.sequence.sequence_id, position)
        for chunk in chunks
        for position in range(chunk.start, chunk.end)
    ]
    sizes = [sum(chunk.num_tokens for chunk in part) for part in (first, second)]
    assert min(sizes) >= 1 and abs(sizes[0] - sizes[1]) <= 1
