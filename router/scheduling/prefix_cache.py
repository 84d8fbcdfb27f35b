"""Finds keys and values that were computed before: full blocks by hash, shared without a copy.

The hash of a block covers its tokens and its parent's hash. The chain begins with the view of the model (its
epoch, and what the policy leaves of it) and the tenant, so neither another version of the model, nor another
policy, nor another tenant ever gets these blocks. Only full, computed blocks
have a hash, and they are never written again: a sequence writes behind the blocks that it shares.

Where a model has recurrent states, a prefix can be reused only with both its blocks and a snapshot of the
state after the last of them. Keys and values are cached for every token, states at few points: at the last
full block of a prompt, for prompts that begin alike and for the next turn of a conversation; and where a
prompt diverges from blocks that were found, since an earlier prompt has diverged there as well.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from router.scheduling.block_pool import BlockPool
from router.scheduling.sequence import Sequence
from router.scheduling.state_pool import StatePool

DIGEST_BYTES = 32


class PrefixCache:
    """The cached prefixes: blocks of a pool by hash, and snapshots of the states after them."""

    def __init__(self, pool: BlockPool, states: StatePool | None = None) -> None:
        self._pool = pool
        self._states = states
        self.num_looked_up = 0
        self.num_hit = 0

    def share_blocks(self, sequence: Sequence) -> list[int]:
        """The leading blocks of a sequence that are cached, each with this sequence as one more user.

        They never hold all of its tokens: the last one has to be computed for its logits.
        """
        found: list[int] = []
        if sequence.reads_all:
            return found
        for block_hash in self.block_hashes(sequence, (len(sequence.tokens) - 1) // self._pool.block_tokens):
            block = self._pool.share(block_hash)
            if block is None:
                break
            found.append(block)
        return found if self._states is None else self._up_to_snapshot(sequence, found, self._states)

    def count(self, sequence: Sequence, num_blocks: int) -> None:
        """Counts a lookup that found `num_blocks` blocks, all of which the sequence now uses."""
        if not sequence.reads_all:
            self.num_looked_up += len(sequence.tokens)
            self.num_hit += num_blocks * self._pool.block_tokens

    def cache_full_blocks(self, sequence: Sequence, num_before: int) -> None:
        """Caches the blocks that a step has filled; before it, `num_before` tokens were computed."""
        if sequence.private:
            return
        first, last = (tokens // self._pool.block_tokens for tokens in (num_before, sequence.num_computed))
        if first < last:
            hashes = self.block_hashes(sequence, last)
            for block, block_hash in zip(sequence.blocks[first:last], hashes[first:last], strict=True):
                self._pool.set_hash(block, block_hash)
            if self._states is not None and sequence.num_computed in sequence.snapshot_points:
                assert sequence.state is not None
                self._states.snapshot(sequence.state, hashes[last - 1])

    def pending_hashes(self, sequence: Sequence) -> list[bytes]:
        """The hashes at which others can join, once this sequence has computed its prompt."""
        if sequence.private:
            return []
        size = self._pool.block_tokens
        if self._states is None:
            return sequence.block_hashes[sequence.num_computed // size :]
        return [
            sequence.block_hashes[point // size - 1]
            for point in sequence.snapshot_points
            if point > sequence.num_computed
        ]

    def should_wait(self, sequence: Sequence, num_shared: int, pending: set[bytes]) -> bool:
        """Whether a running sequence is computing what follows this one's shared blocks.

        `pending`: the hashes of what running sequences compute. Waiting costs less than computing it twice.
        """
        if sequence.reads_all:
            return False
        missing = sequence.block_hashes[num_shared:]
        return any(block_hash in pending for block_hash in (missing[:1] if self._states is None else missing))

    def block_hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """The hashes of a sequence's first `num_blocks` blocks, each computed once in its life."""
        size, hashes = self._pool.block_tokens, sequence.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else _root(sequence)
            tokens = array("I", sequence.tokens[start : start + size]).tobytes()
            hashes.append(blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest())
        return hashes[:num_blocks]

    def _up_to_snapshot(self, sequence: Sequence, found: list[int], states: StatePool) -> list[int]:
        """The found blocks up to the last with a snapshot. Sets snapshot points where they are missing."""
        size, hashes = self._pool.block_tokens, sequence.block_hashes
        usable = next((n for n in range(len(found), 0, -1) if states.has_snapshot(hashes[n - 1])), 0)
        last = (len(sequence.tokens) - 1) // size
        sequence.snapshot_points = tuple(size * n for n in sorted({len(found), last}) if n > usable)
        unusable = found[usable:]
        self._pool.release(unusable)
        return found[:usable]


def _root(sequence: Sequence) -> bytes:
    # The key of a view holds no zero byte, so no tenant can imitate another view.
    return blake2b(f"{sequence.view}\0{sequence.tenant}".encode(), digest_size=DIGEST_BYTES).digest()
