"""A step in two micro-batches."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from router.engine.overlap import halves, micro_batches
from router.scheduling.sequence import Chunk, Sequence


def make_chunks(*num_tokens: int) -> tuple[Chunk, ...]:
    return tuple(
        Chunk(Sequence(str(index), [0] * (num + 3), num + 3), 3, num) for index, num in enumerate(num_tokens)
    )


def test_a_single_token_is_never_split() -> None:
    chunks = make_chunks(1)
    assert micro_batches(chunks) == (chunks,)


def test_a_step_of_two_tokens_is_two_micro_batches() -> None:
    first, second = make_chunks(1, 1)
    assert micro_batches((first, second)) == ((first,), (second,))


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
