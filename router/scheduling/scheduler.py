"""Chooses what the next step runs. No tensors, no clock, no I/O: the same calls give the same batches.

Running sequences come first, those that decode before those that still read their prompt. What is left of the
token budget goes to chunks of prompts; beside decoding sequences, no more than the prefill budget allows.
Waiting sequences are admitted in the order of fair_queue.py. A running one is preempted when the KV pool runs
dry, the newest of the call that holds most places, and when one that waits has the better right to its place: its
blocks are freed and it later starts over from its own tokens. It loses time, never a token. A paused sequence
gives its place up in the same way and waits for nothing until it is resumed. A parked one gives up its place alone:
its blocks are taken when others need them. A recurrent state cannot take a step back, so that such a sequence starts
over when it is parked.
"""

from __future__ import annotations

import itertools
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
    # Whether prompts are never cut, because an encoder reads them in both directions. The last prompt of a
    # batch may then exceed `max_batch_tokens`.
    whole_prompts: bool = False


class Scheduler:
    """Which sequences run and which wait, over a pool of KV blocks and, for recurrent models, one of states.

    Without `prefixes` nothing is shared. Without `prefill_budget` a step reads as many prompt tokens as fit.
    """

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
        self._paused: dict[str, Sequence] = {}
        self._parked: dict[str, Sequence] = {}
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is neither paused nor parked."""
        return bool(self.running or self.waiting)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a running, waiting, paused or parked sequence and frees what it holds."""
        if self._paused.pop(sequence.sequence_id, None) is None:
            self._take_out(sequence)

    def pause(self, sequence: Sequence) -> None:
        """Neither runs a sequence nor lets it wait, and frees what it holds, until it is resumed."""
        if sequence.sequence_id not in self._paused:
            self._take_out(sequence)
            self._paused[sequence.sequence_id] = sequence

    def resume(self, sequence: Sequence) -> None:
        """Queues a paused sequence again, behind those that wait."""
        if self._paused.pop(sequence.sequence_id, None) is not None:
            self.waiting.add(sequence)

    def park(self, sequence: Sequence) -> None:
        """Takes a running sequence out until it is unparked. It keeps its blocks while nobody else needs them."""
        if sequence.state is not None:
            self._stop_running(sequence)
        else:
            self.running.remove(sequence)
            self.waiting.leave(sequence)
        self._parked[sequence.sequence_id] = sequence

    def unpark(self, sequence: Sequence) -> None:
        """Lets a parked sequence go on where it stopped, or start over ahead of those that wait."""
        if self._parked.pop(sequence.sequence_id, None) is None:
            return
        if sequence.blocks and len(self.running) < self.limits.max_running:
            self.waiting.rejoin(sequence)
            self.running.append(sequence)
        else:
            self._free(sequence)
            self.waiting.put_back(sequence)

    def is_parked(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._parked

    def schedule(self) -> tuple[Chunk, ...]:
        """The next batch, its blocks allocated: at most `max_batch_tokens` tokens (but see `Limits`)."""
        chunks: list[Chunk] = []
        claimant = self._claim()
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        budget = self._extend(chunks, decoding, self.limits.max_batch_tokens)
        reading = [sequence for sequence in self.running if sequence.num_pending > 1]
        if self._prefill_budget is not None:
            num_unread = len(reading) + len(self.waiting)
            budget = min(budget, self._prefill_budget.tokens(len(chunks), num_unread))
        budget = self._extend(chunks, reading, budget)
        self._admit(chunks, budget, claimant)
        return tuple(chunks)

    def advance(self, chunk: Chunk) -> None:
        """Records that a chunk is computed, so that its keys, values and state are in the cache."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if self.prefixes is not None:
            self.prefixes.cache_full_blocks(sequence, chunk.start)
        if chunk.reaches_end:
            self.waiting.charge(sequence.tenant, 1)

    def discard_cached(self, sequence: Sequence) -> None:
        """Keeps what a sequence left in the cache from being used again: its values are wrong."""
        self.pool.discard_hashes(sequence.blocks)
        if self.states is not None:
            self.states.discard_snapshots(sequence.block_hashes)

    def observe(self, chunks: tuple[Chunk, ...], seconds: float) -> None:
        """Records that a step over these chunks took `seconds`."""
        if self._prefill_budget is not None:
            self._prefill_budget.observe(*count(chunks), seconds)

    def check_integrity(self) -> None:
        sequences = (*self.running, *self.waiting, *self._parked.values())
        self.pool.check_integrity(sequence.blocks for sequence in sequences)
        if self.states is not None:
            self.states.check_integrity(
                sequence.state for sequence in sequences if sequence.state is not None
            )

    def _extend(self, chunks: list[Chunk], sequences: list[Sequence], budget: int) -> int:
        """Adds the next chunks of running sequences, and returns what is left of the budget."""
        preemptions = self.num_preemptions
        for sequence in sequences:
            if budget <= 0:
                break
            # An earlier sequence of this loop may have preempted this one.
            is_running = self.num_preemptions == preemptions or sequence in self.running
            if is_running and self._make_room(sequence, budget, chunks):
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].num_tokens
        return budget

    def _claim(self) -> Sequence | None:
        """Preempts the sequence whose place or blocks one that waits has the better right to. Returns the
        latter."""
        claim = self.waiting.claim(self.running) if self.waiting and self.running else None
        if claim is None or self._has_room(claim[0]):
            return None
        claimant, holder = claim
        self._stop_running(holder)
        self.waiting.add(holder)
        self.num_preemptions += 1
        return claimant

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there are a place and blocks for a waiting sequence."""
        if len(self.running) >= self.limits.max_running:
            return False
        blocks = [] if self.prefixes is None else self.prefixes.share_blocks(sequence)
        fits = self._free_parked(self.pool.blocks_for(len(sequence.tokens)) - len(blocks))
        self.pool.release(blocks)
        return fits

    def _admit(self, chunks: list[Chunk], budget: int, claimant: Sequence | None) -> None:
        """Admits waiting sequences, the claimant first, while there are places, tokens and blocks for them."""
        if not self.waiting or budget <= 0 or len(self.running) >= self.limits.max_running:
            return
        pending = self._pending_hashes(self.running)
        for sequence in itertools.chain(() if claimant is None else (claimant,), self.waiting):
            if budget <= 0 or len(self.running) >= self.limits.max_running:
                break
            blocks = [] if self.prefixes is None else self.prefixes.share_blocks(sequence)
            if self.prefixes is not None and self.prefixes.should_wait(sequence, len(blocks), pending):
                self.pool.release(blocks)
                continue
            # Room for all of it, not just its first chunk: else two long prompts starve each other.
            if not self._free_parked(self.pool.blocks_for(len(sequence.tokens)) - len(blocks)):
                self.pool.release(blocks)
                break
            self._start(sequence, blocks)
            chunks.append(self._chunk(sequence, budget))
            self.pool.extend(sequence.blocks, chunks[-1].end)
            budget -= chunks[-1].num_tokens
            pending |= self._pending_hashes([sequence])

    def _start(self, sequence: Sequence, blocks: list[int]) -> None:
        """Makes a waiting sequence a running one whose first tokens are in the shared `blocks`."""
        sequence.blocks = blocks
        sequence.num_computed = len(blocks) * self.pool.block_tokens
        if self.states is not None:
            sequence.state = self.states.begin(sequence.block_hashes[len(blocks) - 1] if blocks else None)
        if self.prefixes is not None and not sequence.output:
            self.prefixes.count(sequence, len(blocks))
        self.waiting.admit(sequence)
        self.running.append(sequence)

    def _pending_hashes(self, sequences: Iterable[Sequence]) -> set[bytes]:
        """The hashes that those of the sequences that still read their prompts will have cached."""
        if self.prefixes is None:
            return set()
        return {
            block_hash
            for sequence in sequences
            if sequence.num_pending > 1
            for block_hash in self.prefixes.pending_hashes(sequence)
        }

    def _make_room(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> bool:
        """Allocates the blocks of the next chunk and preempts other sequences for them if need be.

        False: the sequence itself was preempted.
        """
        while True:
            try:
                self.pool.extend(sequence.blocks, self._chunk(sequence, budget).end)
                return True
            except OutOfBlocks:
                if self._free_last_parked():
                    continue
                holder = self._idle_holder(chunks)
                self._stop_running(holder)
                self.waiting.put_back(holder)
                self.num_preemptions += 1
                if holder is sequence:
                    return False

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """The next chunk of a sequence, which ends at the next snapshot point at the latest."""
        start = sequence.num_computed
        if self.limits.whole_prompts:
            budget = max(budget, sequence.num_prompt_tokens - start)
        to_snapshot = (point - start for point in sequence.snapshot_points if point > start)
        return Chunk(
            sequence, start, min(sequence.num_pending, budget, next(to_snapshot, sequence.num_pending))
        )

    def _idle_holder(self, chunks: list[Chunk]) -> Sequence:
        """The running sequence that gives its blocks up: one that is not in this batch yet, the caller's own being
        one such."""
        scheduled = {chunk.sequence.sequence_id for chunk in chunks}
        idle = [sequence for sequence in self.running if sequence.sequence_id not in scheduled]
        return self.waiting.newest_of_most(idle)

    def _take_out(self, sequence: Sequence) -> None:
        """Removes a running, parked or waiting sequence and frees what it holds."""
        if self._parked.pop(sequence.sequence_id, None) is not None:
            self._free(sequence)
        elif sequence in self.running:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        """Frees the place, the blocks and the state slot of a running sequence, which has to start over."""
        self.running.remove(sequence)
        self.waiting.leave(sequence)
        self._free(sequence)

    def _free_parked(self, num_blocks: int) -> bool:
        """Takes blocks from parked sequences as far as `num_blocks` are wanted. Whether so many are free."""
        while num_blocks > self.pool.num_free:
            if not self._free_last_parked():
                return False
        return True

    def _free_last_parked(self) -> bool:
        """Lets the newest parked sequence that has blocks start over; False where none has any."""
        holder = next((one for one in reversed(self._parked.values()) if one.blocks), None)
        if holder is None:
            return False
        self._free(holder)
        self.num_preemptions += 1
        return True

    def _free(self, sequence: Sequence) -> None:
        """Frees the blocks and the state slot of a sequence that does not run, so that it has to start over."""
        sequence.num_computed = 0
        self.pool.release(sequence.blocks)
        if self.states is not None and sequence.state is not None:
            self.states.end(sequence.state)
            sequence.state = None


def count(chunks: Iterable[Chunk]) -> tuple[int, int]:
    """The number of sequences that decode, and of prompt tokens. A prompt's single last token costs what a
    decoded one does, and counts as one."""
    num_decoding = num_prompt_tokens = 0
    for chunk in chunks:
        if chunk.num_tokens == 1:
            num_decoding += 1
        else:
            num_prompt_tokens += chunk.num_tokens
    return num_decoding, num_prompt_tokens
