"""Keys and values in blocks: a pool that counts, a table per sequence, one pair of tensors per layer.

The pool is pure bookkeeping and can prove itself: every block is either free or owned by exactly one sequence.

Shapes: S cache positions (blocks x block_tokens), G key/value heads, d head size, T tokens of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch


class OutOfBlocks(Exception):
    """The pool cannot give that many blocks; the scheduler makes room."""


class BlockPool:
    """Free list over `num_blocks` blocks of `block_tokens` positions."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # Lowest numbers first, so that a short test and a long day touch the same memory.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` positions need."""
        return -(-num_tokens // self.block_tokens)

    def extend(self, blocks: list[int], num_tokens: int) -> None:
        """Grows a sequence's table to hold `num_tokens` positions. Raises OutOfBlocks and then changes nothing."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > len(self._free):
            raise OutOfBlocks
        for _ in range(missing):
            blocks.append(self._free.pop())

    def release(self, blocks: list[int]) -> None:
        """Takes all blocks of a sequence back and empties its table."""
        self._free.extend(reversed(blocks))
        blocks.clear()

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Asserts that free and owned blocks add up to the pool, each exactly once."""
        owners = Counter(self._free)
        for table in tables:
            owners.update(table)
        wrong = {block: n for block, n in owners.items() if n != 1}
        assert not wrong and len(owners) == self.num_blocks, (
            f"KV blocks do not add up: {len(owners)} of {self.num_blocks}, owned more than once: {sorted(wrong)}"
        )


class KVCache:
    """The tensors: per layer, keys and values of every position, [S, G, d]."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_positions: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_positions, num_kv_heads, head_dim)
        # Not initialised: memory is taken from the machine when it is first written.
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    def write(self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [T, G, d] at cache positions [T]."""
        self.keys[layer].index_copy_(0, positions, keys)
        self.values[layer].index_copy_(0, positions, values)

    @staticmethod
    def token_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one token takes over all layers."""
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
