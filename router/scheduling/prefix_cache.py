"""Finds keys and values that were computed before: full blocks by name, shared without a copy.

A block's name is a digest of its tokens and of its parent's name; the chain begins with the epoch and the tenant, so
neither another version of the model nor another tenant ever gets these blocks. Only computed blocks have names, and a
named block is never written again: a sequence writes behind what it shares.

Where a model has recurrent states, a prefix is found if both are there, its blocks and the state after the last of them.
Keys and values are kept of every token, states of few: at the last full block of a prompt, for those that begin alike
and for what is asked next; and where a prompt leaves blocks that were found, because there another one has left them
before.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from router.scheduling.block_pool import BlockPool
from router.scheduling.sequence import Sequence
from router.scheduling.state_pool import StatePool

DIGEST_BYTES = 32


class PrefixCache:
    """Names the blocks of one epoch in a pool, and takes them from it by name; so, too, the states after them."""

    def __init__(self, pool: BlockPool, epoch: str, states: StatePool | None = None) -> None:
        self._pool = pool
        self._epoch = epoch
        self._states = states
        self.num_looked_up = 0
        self.num_hit = 0

    def take(self, sequence: Sequence) -> list[int]:
        """The leading blocks of a sequence that are there, with it as one more user of each.

        Never all of its tokens: somebody has to compute the last one, for its logits.
        """
        found: list[int] = []
        if sequence.reads_all:
            return found
        names = self.names(sequence, (len(sequence.tokens) - 1) // self._pool.block_tokens)
        for name in names:
            block = self._pool.share(name)
            if block is None:
                break
            found.append(block)
        return found if self._states is None else self._up_to_a_state(sequence, found, self._states)

    def count(self, sequence: Sequence, num_blocks: int) -> None:
        """Counts a look-up that found `num_blocks` blocks and was made use of."""
        if not sequence.reads_all:
            self.num_looked_up += len(sequence.tokens)
            self.num_hit += num_blocks * self._pool.block_tokens

    def add(self, sequence: Sequence, num_before: int) -> None:
        """Names the blocks that are full of computed tokens now; before, `num_before` tokens were computed."""
        first, last = (tokens // self._pool.block_tokens for tokens in (num_before, sequence.num_computed))
        if first < last:
            names = self.names(sequence, last)
            for block, name in zip(sequence.blocks[first:last], names[first:last], strict=True):
                self._pool.name(block, name)
            if self._states is not None and sequence.num_computed in sequence.marks:
                assert sequence.state is not None
                self._states.keep(sequence.state, names[last - 1])

    def promises(self, sequence: Sequence) -> list[bytes]:
        """Names up to which others will find a prefix, once this sequence has read its prompt."""
        size = self._pool.block_tokens
        if self._states is None:
            return sequence.names[sequence.num_computed // size :]
        return [sequence.names[mark // size - 1] for mark in sequence.marks if mark > sequence.num_computed]

    def awaits(self, sequence: Sequence, num_shared: int, promised: set[bytes]) -> bool:
        """Whether another sequence is computing what comes behind this one's shared blocks: to wait for it costs less
        than both."""
        if sequence.reads_all:
            return False
        missing = sequence.names[num_shared:]
        return any(name in promised for name in (missing[:1] if self._states is None else missing))

    def _up_to_a_state(self, sequence: Sequence, found: list[int], states: StatePool) -> list[int]:
        """Of the blocks that were found, those up to the last that has a state; marks where states are missing."""
        size = self._pool.block_tokens
        usable = next((n for n in range(len(found), 0, -1) if states.has(sequence.names[n - 1])), 0)
        last = (len(sequence.tokens) - 1) // size
        sequence.marks = tuple(size * n for n in sorted({len(found), last}) if n > usable)
        unusable = found[usable:]
        self._pool.release(unusable)
        return found[:usable]

    def names(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Of the sequence's first `num_blocks` blocks; each is hashed once in the sequence's life."""
        size, names = self._pool.block_tokens, sequence.names
        while len(names) < num_blocks:
            start = len(names) * size
            parent = names[-1] if names else self._root(sequence.tenant)
            tokens = array("I", sequence.tokens[start : start + size]).tobytes()
            names.append(blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest())
        return names[:num_blocks]

    def _root(self, tenant: str) -> bytes:
        # An epoch's id holds no zero byte: no tenant can spell another epoch.
        return blake2b(f"{self._epoch}\0{tenant}".encode(), digest_size=DIGEST_BYTES).digest()
