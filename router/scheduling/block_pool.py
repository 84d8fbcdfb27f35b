"""Which blocks of the KV cache are free, in use, or evictable. Pure.

The pool can check its own state: every block is free, in use by one or more sequences, or evictable. An
evictable block holds cached keys and values under a block hash (see prefix_cache.py) and has no user. When
the pool runs out of free blocks it evicts the least recently used one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """The pool cannot provide that many blocks; the scheduler has to make room."""


class BlockPool:
    """`num_blocks` blocks of `block_tokens` positions each, with a count of the users of every block."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # The lowest numbers are taken first, so that short and long runs touch the same memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_users = [0] * num_blocks
        # Hashed blocks without a user, the least recently used first.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """The number of blocks that can be allocated, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """The number of blocks that at least one sequence uses."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that `num_tokens` positions need."""
        return -(-num_tokens // self.block_tokens)

    def extend(self, blocks: list[int], num_tokens: int) -> None:
        """Grows a block table to hold `num_tokens` positions. Changes nothing if it raises OutOfBlocks."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > self.num_free:
            raise OutOfBlocks
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._num_users[block] = 1
            blocks.append(block)

    def release(self, blocks: list[int]) -> None:
        """Removes one user from every block of a table, and empties the table."""
        # In reverse, so that of a chain without users the end is evicted before its parents.
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._retire(block)
        blocks.clear()

    def set_hash(self, block: int, block_hash: bytes) -> None:
        """Makes a block in use available under its hash. Only the first block of a hash is shared."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def share(self, block_hash: bytes) -> int | None:
        """The block with that hash, with one more user; None if there is none."""
        block = self._block_of.get(block_hash)
        if block is not None:
            self._evictable.pop(block, None)
            self._num_users[block] += 1
        return block

    def discard_hashes(self, blocks: Iterable[int]) -> None:
        """Makes blocks in use unavailable to new users; those that they have keep them."""
        for block in blocks:
            self._discard_hash(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that every block is free, evictable, or in exactly as many tables as it has users."""
        used = Counter(block for table in tables for block in table)
        where = Counter(self._free)
        where.update(self._evictable.keys())
        where.update(used.keys())
        wrong = {block for block, places in where.items() if places != 1}
        wrong |= {block for block, users in enumerate(self._num_users) if users != used[block]}
        assert not wrong and len(where) == self.num_blocks, (
            f"KV blocks do not add up: {len(where)} of {self.num_blocks}, wrong: {sorted(wrong)}"
        )
        unhashed = self._evictable.keys() - self._hash_of.keys()
        assert not unhashed and self._block_of == {hash_: block for block, hash_ in self._hash_of.items()}, (
            "hashes of KV blocks do not add up"
        )
        assert self._hash_of.keys().isdisjoint(self._free), "a free KV block has a hash"

    def _retire(self, block: int) -> None:
        if block in self._hash_of:
            self._evictable[block] = None
        else:
            self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        self._discard_hash(block)
        return block

    def _discard_hash(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
