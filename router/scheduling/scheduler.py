"""Chooses what the next step runs. No tensors, no clock, no I/O: the same calls give the same batches.

Running sequences come first, those that decode before those that still read their prompt; what is left of the token
budget goes to chunks of prompts, beside sequences that decode no more than prefill_budget.py allows. Waiting sequences are
admitted in the order of `fair_queue.py`. When the KV pool runs dry the newest sequence gives its blocks back and starts
over later from its own tokens: it loses time, never a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.scheduling.block_pool import BlockPool, OutOfBlocks
from router.scheduling.fair_queue import FairQueue
from router.scheduling.prefill_budget import PrefillBudget
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.sequence import Chunk, Sequence
from router.scheduling.state_pool import StatePool


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a batch."""

    max_batch_tokens: int
    max_running: int
    # An encoder reads a prompt both ways: it is never cut. The last one of a batch may then make it longer.
    whole_prompts: bool = False


class Scheduler:
    """What runs and what waits, over one block pool, and one of states where the model has recurrent ones. Without
    `prefixes` nothing is shared; without `prefill_budget` a step reads as much of prompts as fits into it."""

    def __init__(
        self,
        limits: Limits,
        pool: BlockPool,
        *,
        prefixes: PrefixCache | None = None,
        prefill_budget: PrefillBudget | None = None,
        states: StatePool | None = None,
    ) -> None:
        self.limits = limits
        self.pool = pool
        self.prefixes = prefixes
        self.states = states
        self._prefill_budget = prefill_budget
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence wherever it is and lets go of its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._let_go(sequence)

    def schedule(self) -> tuple[Chunk, ...]:
        """The next batch: at most `max_batch_tokens` tokens (but see `Limits`), blocks for all of them held."""
        chunks: list[Chunk] = []
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        budget = self._extend(chunks, decoding, self.limits.max_batch_tokens)
        reading = [sequence for sequence in self.running if sequence.num_pending > 1]
        if self._prefill_budget is not None:
            budget = min(budget, self._prefill_budget.tokens(len(chunks), len(reading) + len(self.waiting)))
        budget = self._extend(chunks, reading, budget)
        self._admit(chunks, budget)
        return tuple(chunks)

    def advance(self, chunk: Chunk) -> None:
        """What the chunk leaves to later tokens is in the cache now."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if self.prefixes is not None:
            self.prefixes.add(sequence, chunk.start)
        if chunk.reaches_end:
            self.waiting.charge(sequence.tenant, 1)

    def distrust(self, sequence: Sequence) -> None:
        """What a sequence left in the cache is not to be used again."""
        self.pool.forget(sequence.blocks)
        if self.states is not None:
            self.states.forget(sequence.names)

    def observe(self, chunks: tuple[Chunk, ...], seconds: float) -> None:
        """How long a step took."""
        if self._prefill_budget is not None:
            self._prefill_budget.observe(*count(chunks), seconds)

    def check_integrity(self) -> None:
        sequences = (*self.running, *self.waiting)
        self.pool.check_integrity(sequence.blocks for sequence in sequences)
        if self.states is not None:
            self.states.check_integrity(
                sequence.state for sequence in sequences if sequence.state is not None
            )

    def _extend(self, chunks: list[Chunk], sequences: list[Sequence], budget: int) -> int:
        """Gives running sequences their next chunks; what is left of the budget."""
        preemptions = self.num_preemptions
        for sequence in sequences:
            if budget <= 0:
                break
            # A sequence earlier in this very loop may have taken this one's blocks.
            has_place = self.num_preemptions == preemptions or sequence in self.running
            if has_place and self._make_room(sequence, budget, chunks):
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].num_tokens
        return budget

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Gives places to waiting sequences, as long as there are places, tokens and blocks."""
        if not self.waiting or budget <= 0 or len(self.running) >= self.limits.max_running:
            return
        promised = self._promised(self.running)
        for sequence in self.waiting:
            if budget <= 0 or len(self.running) >= self.limits.max_running:
                break
            blocks = [] if self.prefixes is None else self.prefixes.take(sequence)
            if self.prefixes is not None and self.prefixes.awaits(sequence, len(blocks), promised):
                self.pool.release(blocks)
                continue
            # Room for the whole of it, not just its first chunk: else two long prompts starve each other.
            if self.pool.blocks_for(len(sequence.tokens)) - len(blocks) > self.pool.num_free:
                self.pool.release(blocks)
                break
            self._place(sequence, blocks)
            chunks.append(self._chunk(sequence, budget))
            self.pool.extend(sequence.blocks, chunks[-1].end)
            budget -= chunks[-1].num_tokens
            promised |= self._promised([sequence])

    def _place(self, sequence: Sequence, blocks: list[int]) -> None:
        """Makes a waiting sequence a running one that begins behind the shared `blocks`."""
        sequence.blocks = blocks
        sequence.num_computed = len(blocks) * self.pool.block_tokens
        if self.states is not None:
            sequence.state = self.states.begin(sequence.names[len(blocks) - 1] if blocks else None)
        if self.prefixes is not None and not sequence.output:
            self.prefixes.count(sequence, len(blocks))
        self.waiting.admit(sequence)
        self.running.append(sequence)

    def _promised(self, sequences: Iterable[Sequence]) -> set[bytes]:
        """Names that others will find, of those of these sequences that still read their prompts."""
        if self.prefixes is None:
            return set()
        return {
            name
            for sequence in sequences
            if sequence.num_pending > 1
            for name in self.prefixes.promises(sequence)
        }

    def _make_room(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> bool:
        """Takes the blocks for the next chunk, from the newest sequences if need be. False: it lost its own place."""
        while True:
            try:
                self.pool.extend(sequence.blocks, self._chunk(sequence, budget).end)
                return True
            except OutOfBlocks:
                newest = self._newest_idle(chunks)
                self._preempt(newest)
                if newest is sequence:
                    return False

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """The next of a sequence, at most up to the next mark."""
        start = sequence.num_computed
        if self.limits.whole_prompts:
            budget = max(budget, sequence.num_prompt_tokens - start)
        to_mark = next((mark - start for mark in sequence.marks if mark > start), sequence.num_pending)
        return Chunk(sequence, start, min(sequence.num_pending, budget, to_mark))

    def _newest_idle(self, chunks: list[Chunk]) -> Sequence:
        """The last to arrive among the sequences that are not in this batch yet; the caller itself is one of them."""
        scheduled = {chunk.sequence.sequence_id for chunk in chunks}
        return next(sequence for sequence in reversed(self.running) if sequence.sequence_id not in scheduled)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._let_go(sequence)
        sequence.num_computed = 0
        self.waiting.put_back(sequence)
        self.num_preemptions += 1

    def _let_go(self, sequence: Sequence) -> None:
        """Of its blocks and of its state."""
        self.pool.release(sequence.blocks)
        if self.states is not None and sequence.state is not None:
            self.states.end(sequence.state)
            sequence.state = None


def count(chunks: Iterable[Chunk]) -> tuple[int, int]:
    """Sequences that decode, and tokens of prompts. A prompt's single last token is as cheap as a decoded one."""
    num_decoding = num_prompt_tokens = 0
    for chunk in chunks:
        if chunk.num_tokens == 1:
            num_decoding += 1
        else:
            num_prompt_tokens += chunk.num_tokens
    return num_decoding, num_prompt_tokens
