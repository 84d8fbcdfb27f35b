"""Finds keys and values that were computed before: full blocks by name, shared without a copy.

A block's name is a digest of its tokens and of its parent's name; the chain begins with the epoch and the tenant, so
neither another version of the model nor another tenant ever gets these blocks. Only computed blocks have names, and a
named block is never written again: a sequence writes behind what it shares.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from router.chunk import Sequence
from router.kv_cache import BlockPool

DIGEST_BYTES = 32


class PrefixCache:
    """Names the blocks of one epoch in a pool, and takes them from it by name."""

    def __init__(self, pool: BlockPool, epoch: str) -> None:
        self._pool = pool
        self._epoch = epoch
        self.num_looked_up = 0
        self.num_hit = 0

    def take(self, sequence: Sequence) -> list[int]:
        """The leading blocks of a sequence that are there, with it as one more user of each.

        Never all of its tokens: somebody has to compute the last one, for its logits.
        """
        found: list[int] = []
        if sequence.reads_all:
            return found
        for name in self.names(sequence, (len(sequence.tokens) - 1) // self._pool.block_tokens):
            block = self._pool.share(name)
            if block is None:
                break
            found.append(block)
        return found

    def count(self, sequence: Sequence, num_blocks: int) -> None:
        """Counts a look-up that found `num_blocks` blocks and was made use of."""
        if not sequence.reads_all:
            self.num_looked_up += len(sequence.tokens)
            self.num_hit += num_blocks * self._pool.block_tokens

    def add(self, sequence: Sequence, num_before: int) -> None:
        """Names the blocks that are full of computed tokens now; before, `num_before` tokens were computed."""
        first, last = (tokens // self._pool.block_tokens for tokens in (num_before, sequence.num_computed))
        if first < last:
            for block, name in zip(
                sequence.blocks[first:last], self.names(sequence, last)[first:last], strict=True
            ):
                self._pool.name(block, name)

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
