"""Cuts a step into two micro-batches: the router computes one while workers compute the other."""

from __future__ import annotations

from router.scheduling.sequence import Chunk


def micro_batches(chunks: tuple[Chunk, ...]) -> tuple[tuple[Chunk, ...], ...]:
    """The two halves of a step; a step of a single token cannot be split and stays whole."""
    return (chunks,) if sum(chunk.num_tokens for chunk in chunks) < 2 else halves(chunks)


def halves(chunks: tuple[Chunk, ...]) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Two parts with about equally many tokens, in order. A chunk across the middle is cut in two."""
    left = sum(chunk.num_tokens for chunk in chunks) // 2
    first: list[Chunk] = []
    second: list[Chunk] = []
    for chunk in chunks:
        taken = min(left, chunk.num_tokens)
        if taken:
            first.append(Chunk(chunk.sequence, chunk.start, taken))
        if taken < chunk.num_tokens:
            second.append(Chunk(chunk.sequence, chunk.start + taken, chunk.num_tokens - taken))
        left -= taken
    return tuple(first), tuple(second)
