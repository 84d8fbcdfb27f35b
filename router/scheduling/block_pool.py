"""Which blocks of the KV cache are free, used, or evictable. Pure.

The pool can prove its own state: every block is free, used by one or more sequences, or evictable. An evictable block is
full of keys and values that have a hash (see prefix_cache.py) and no user; the pool takes it when it needs room, the one
that was used longest ago first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """The pool cannot give that many blocks; the scheduler makes room."""


class BlockPool:
    """`num_blocks` blocks of `block_tokens` positions, with the number of their users."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # Lowest numbers first, so that a short test and a long day touch the same memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        # Named blocks without a user, the one that was used longest ago first.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be given away, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence uses."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` positions need."""
        return -(-num_tokens // self.block_tokens)

    def extend(self, blocks: list[int], num_tokens: int) -> None:
        """Grows a sequence's table to hold `num_tokens` positions. Raises OutOfBlocks and then changes nothing."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > self.num_free:
            raise OutOfBlocks
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            blocks.append(block)

    def release(self, blocks: list[int]) -> None:
        """Lets go of all blocks of a sequence and empties its table."""
        # The last first: of a chain that nobody uses, the end goes before what it hangs on.
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._put_away(block)
        blocks.clear()

    def name(self, block: int, name: bytes) -> None:
        """What a used block holds from now on. The first block of a name stays the one that is found by it."""
        if name not in self._named and block not in self._names:
            self._names[block] = name
            self._named[name] = block

    def share(self, name: bytes) -> int | None:
        """The block of that name, with one more user; None if there is none."""
        block = self._named.get(name)
        if block is not None:
            self._kept.pop(block, None)
            self._users[block] += 1
        return block

    def forget(self, blocks: Iterable[int]) -> None:
        """These used blocks are not found by name any more; whoever uses them goes on."""
        for block in blocks:
            self._unname(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that every block is free, kept or used, by just as many tables as it has users."""
        used = Counter(block for table in tables for block in table)
        where = Counter(self._free)
        where.update(self._kept.keys())
        where.update(used.keys())
        wrong = {block for block, places in where.items() if places != 1}
        wrong |= {block for block, users in enumerate(self._users) if users != used[block]}
        assert not wrong and len(where) == self.num_blocks, (
            f"KV blocks do not add up: {len(where)} of {self.num_blocks}, wrong: {sorted(wrong)}"
        )
        nameless = self._kept.keys() - self._names.keys()
        assert not nameless and self._named == {name: block for block, name in self._names.items()}, (
            "names of KV blocks do not add up"
        )
        assert self._names.keys().isdisjoint(self._free), "a free KV block has a name"

    def _put_away(self, block: int) -> None:
        if block in self._names:
            self._kept[block] = None
        else:
            self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        self._unname(block)
        return block

    def _unname(self, block: int) -> None:
        name = self._names.pop(block, None)
        if name is not None:
            del self._named[name]
