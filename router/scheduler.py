"""Chooses what the next step runs. No tensors, no clock, no I/O: the same calls give the same batches.

Running sequences come first, those that decode before those that still read their prompt; what is left of the token
budget goes to chunks of prompts, in order of arrival. When the KV pool runs dry the newest sequence gives its blocks
back and starts over later from its own tokens: it loses time, never a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from router.kv_cache import BlockPool, OutOfBlocks


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's half of a request: how many tokens there are, how many are computed, which blocks are held."""

    sequence_id: str
    # Prompt and generated tokens.
    tokens: list[int]
    num_prompt_tokens: int
    # Leading tokens whose keys and values are in the cache.
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    # The generated tokens alone.
    output: list[int] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self.output.append(token_id)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: [start, start + num_tokens)."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def reaches_end(self) -> bool:
        """Whether the chunk's last row predicts a new token."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a batch."""

    max_batch_tokens: int
    max_running: int


class Scheduler:
    """Two queues over one block pool."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self._limits = limits
        self._pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence wherever it is and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._pool.release(sequence.blocks)

    def schedule(self) -> tuple[Chunk, ...]:
        """The next batch: at most `max_batch_tokens` tokens, blocks for all of them held."""
        chunks: list[Chunk] = []
        budget = self._limits.max_batch_tokens
        for sequence in sorted(self.running, key=lambda running: running.num_pending > 1):
            # A sequence earlier in this very loop may have taken this one's blocks.
            if budget > 0 and sequence in self.running and self._make_room(sequence, budget, chunks):
                chunks.append(_chunk(sequence, budget))
                budget -= chunks[-1].num_tokens
        for sequence in self._admit():
            if budget == 0 or not self._fits(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            chunks.append(_chunk(sequence, budget))
            self._pool.extend(sequence.blocks, chunks[-1].end)
            budget -= chunks[-1].num_tokens
        return tuple(chunks)

    def advance(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache now."""
        chunk.sequence.num_computed = chunk.end

    def observe(self, chunks: tuple[Chunk, ...], seconds: float) -> None:
        """How long a step took."""

    def check_integrity(self) -> None:
        self._pool.check_integrity(sequence.blocks for sequence in (*self.running, *self.waiting))

    def _admit(self) -> Iterator[Sequence]:
        while self.waiting and len(self.running) < self._limits.max_running:
            yield self.waiting[0]

    def _fits(self, sequence: Sequence) -> bool:
        # Room for the whole of it, not just its first chunk: else two long prompts starve each other.
        return self._pool.blocks_for(len(sequence.tokens)) <= self._pool.num_free

    def _make_room(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> bool:
        """Takes the blocks for the next chunk, from the newest sequences if need be. False: it lost its own place."""
        while True:
            try:
                self._pool.extend(sequence.blocks, _chunk(sequence, budget).end)
                return True
            except OutOfBlocks:
                newest = self._newest_idle(chunks)
                self._preempt(newest)
                if newest is sequence:
                    return False

    def _newest_idle(self, chunks: list[Chunk]) -> Sequence:
        """The last to arrive among the sequences that are not in this batch yet; the caller itself is one of them."""
        scheduled = {chunk.sequence.sequence_id for chunk in chunks}
        return next(sequence for sequence in reversed(self.running) if sequence.sequence_id not in scheduled)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._pool.release(sequence.blocks)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    return Chunk(sequence, sequence.num_computed, min(sequence.num_pending, budget))
