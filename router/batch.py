"""What one step runs, as tensors: sequences packed one after another, without padding.

All of it is laid out once a step, so that no layer has anything to work out.

Shapes: T tokens of the batch, n rows that are attended in one call, b blocks of each of their contexts, L positions of
these blocks that count, Q query tokens of a chunk, C its context.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from router.chunk import Chunk
from router.kv_cache import Contexts

# On a CPU a call copies its contexts together first: so many positions stay in its last cache until they are read.
_CALL_POSITIONS = {"cpu": 4096}
# Queries of a prefill call on a CPU. Each call reads the context up to its own end, where one call would read all of it.
_CALL_QUERIES = {"cpu": 128}
# Attending to this much padding costs what another call does.
_CALL_COST_POSITIONS = 256
# In a batch-invariant step contexts begin and end at multiples of this.
TILE_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """How the steps of one model are laid out. `window` is the sliding window W: a token sees W tokens, its own
    included; None sees all before it."""

    block_tokens: int
    window: int | None
    device: torch.device
    dtype: torch.dtype
    # Every row is attended by itself, in a shape that its own position decides.
    invariant: bool = False


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows that are attended one token each, against contexts of one length."""

    rows: slice | torch.Tensor  # n rows of the batch
    contexts: Contexts  # n, or one that all rows share
    span: slice  # L of the b * block_tokens positions
    mask: torch.Tensor | None  # [n, 1, 1, L], added to the scores
    invariant: bool  # whether other rows may not reach the last bits of any


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Q consecutive tokens of one sequence, attended together."""

    rows: slice
    contexts: Contexts
    span: slice  # C of the b * block_tokens positions
    mask: torch.Tensor | None  # [Q, C], added to the scores; None: plainly causal


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Inputs of the model for one step."""

    chunks: tuple[Chunk, ...]
    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T] place of each token in its sequence
    cache_positions: torch.Tensor  # [T] where its keys and values go
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]
    first_rows: tuple[int, ...]  # of each chunk

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[1]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that is attended by itself: it sees the positions [first, end) of its sequence."""

    row: int
    blocks: Sequence[int]  # those that hold [base, base + length)
    base: int
    length: int
    first: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether nothing of [base, base + length) has to be masked."""
        return (self.first, self.end) == (self.base, self.base + self.length)


def pack(chunks: tuple[Chunk, ...], layout: Layout) -> PackedBatch:
    """Lays the chunks of a step out as tensors."""
    token_ids: list[int] = []
    positions: list[int] = []
    cache_positions: list[int] = []
    first_rows: list[int] = []
    for chunk in chunks:
        first_rows.append(len(token_ids))
        token_ids.extend(chunk.sequence.tokens[chunk.start : chunk.end])
        positions.extend(range(chunk.start, chunk.end))
        cache_positions.extend(_cache_positions(chunk, layout.block_tokens))
    ids, places, targets = torch.tensor([token_ids, positions, cache_positions]).to(layout.device)
    placed = list(zip(chunks, first_rows, strict=True))
    if layout.invariant:
        decode = _tiled_groups(placed, layout)
    else:
        single = [_decode_row(chunk, row, layout) for chunk, row in placed if chunk.num_tokens == 1]
        decode = [_decode_group(rows, layout) for rows in _group_by_length(single, layout.device)]
        placed = [(chunk, row) for chunk, row in placed if chunk.num_tokens > 1]
    return PackedBatch(
        chunks=chunks,
        token_ids=ids[None],
        positions=places[None],
        cache_positions=targets,
        decode=tuple(decode),
        prefill=() if layout.invariant else tuple(_prefill_chunks(placed, layout)),
        first_rows=tuple(first_rows),
    )


def _cache_positions(chunk: Chunk, block_tokens: int) -> Iterable[int]:
    blocks = chunk.sequence.blocks
    if chunk.num_tokens == 1:
        return (blocks[chunk.start // block_tokens] * block_tokens + chunk.start % block_tokens,)
    places = np.arange(chunk.start, chunk.end)
    found: list[int] = (
        np.asarray(blocks)[places // block_tokens] * block_tokens + places % block_tokens
    ).tolist()
    return found


def _decode_row(chunk: Chunk, row: int, layout: Layout) -> _Row:
    first = max(0, chunk.end - layout.window) if layout.window else 0
    base = first - first % layout.block_tokens
    blocks = chunk.sequence.blocks[base // layout.block_tokens : -(-chunk.end // layout.block_tokens)]
    return _Row(row, blocks, base, chunk.end - base, first, chunk.end)


def _group_by_length(rows: list[_Row], device: torch.device) -> Iterator[list[_Row]]:
    """Rows whose contexts are read together: as many as make a good call, not much longer than one another."""
    most = _CALL_POSITIONS.get(device.type)
    group: list[_Row] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if group:
            longest = group[0].length
            wasteful = longest - row.length > max(row.length, _CALL_COST_POSITIONS)
            if wasteful or (most is not None and longest * (len(group) + 1) > most):
                yield group
                group = []
        group.append(row)
    if group:
        yield group


def _decode_group(rows: list[_Row], layout: Layout) -> DecodeGroup:
    rows = sorted(rows, key=lambda row: row.row)
    longest = max(row.length for row in rows)
    if len(rows) == 1:
        (alone,) = rows
        span = slice(alone.first - alone.base, alone.length)
        return DecodeGroup(_row_index(rows, layout), _contexts([alone.blocks], layout), span, None, False)
    num_blocks = max(len(row.blocks) for row in rows)
    tables = [[*row.blocks, *[0] * (num_blocks - len(row.blocks))] for row in rows]
    whole = all(row.whole and row.length == longest for row in rows)
    return DecodeGroup(
        _row_index(rows, layout),
        _contexts(tables, layout),
        slice(0, longest),
        None if whole else _row_mask(rows, longest, layout),
        invariant=False,
    )


def _tiled_groups(placed: list[tuple[Chunk, int]], layout: Layout) -> list[DecodeGroup]:
    """For every row a call whose shape its position alone decides. Rows of a sequence that see the same tiles share
    theirs: in a call every row is a product of its own."""
    return [
        _tiled_group(list(rows), chunk, layout)
        for chunk, first_row in placed
        for _, rows in itertools.groupby(
            _tiled_rows(chunk, first_row, layout), key=lambda row: (row.base, row.length)
        )
    ]


def _tiled_rows(chunk: Chunk, first_row: int, layout: Layout) -> Iterator[_Row]:
    for index, place in enumerate(range(chunk.start, chunk.end)):
        first = max(0, place + 1 - layout.window) if layout.window else 0
        base = first - first % TILE_POSITIONS
        length = -(-(place + 1 - base) // TILE_POSITIONS) * TILE_POSITIONS
        yield _Row(first_row + index, (), base, length, first, place + 1)


def _tiled_group(rows: list[_Row], chunk: Chunk, layout: Layout) -> DecodeGroup:
    base, length = rows[0].base, rows[0].length
    first_block, skipped = divmod(base, layout.block_tokens)
    num_blocks = -(-(skipped + length) // layout.block_tokens)
    blocks = chunk.sequence.blocks[first_block : first_block + num_blocks]
    table = [*blocks, *[0] * (num_blocks - len(blocks))]
    return DecodeGroup(
        _row_index(rows, layout),
        # Always copied together: the last bits of a product may depend on where in memory its operands lie.
        Contexts(1, num_blocks, torch.tensor(table, device=layout.device)),
        slice(skipped, skipped + length),
        _row_mask(rows, length, layout),
        invariant=True,
    )


def _prefill_chunks(placed: list[tuple[Chunk, int]], layout: Layout) -> Iterator[PrefillChunk]:
    for chunk, first_row in placed:
        most = _CALL_QUERIES.get(layout.device.type, chunk.num_tokens)
        for taken in range(0, chunk.num_tokens, most):
            part = Chunk(chunk.sequence, chunk.start + taken, min(most, chunk.num_tokens - taken))
            yield _prefill_chunk(part, first_row + taken, layout)


def _prefill_chunk(chunk: Chunk, first_row: int, layout: Layout) -> PrefillChunk:
    window = layout.window
    first = max(0, chunk.start + 1 - window) if window else 0
    first_block, skipped = divmod(first, layout.block_tokens)
    blocks = chunk.sequence.blocks[first_block : -(-chunk.end // layout.block_tokens)]
    causal = chunk.start == 0 and (window is None or chunk.end <= window)
    return PrefillChunk(
        slice(first_row, first_row + chunk.num_tokens),
        _contexts([blocks], layout),
        slice(skipped, skipped + chunk.end - first),
        None if causal else _chunk_mask(chunk, first, layout),
    )


def _row_index(rows: list[_Row], layout: Layout) -> slice | torch.Tensor:
    numbers = [row.row for row in rows]
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers, device=layout.device)


def _contexts(tables: list[Sequence[int]] | list[list[int]], layout: Layout) -> Contexts:
    """Contexts of the same number of blocks each. A single one whose blocks lie in a row is read where it is."""
    first, num_blocks = tables[0][0], len(tables[0])
    if len(tables) == 1 and list(tables[0]) == list(range(first, first + num_blocks)):
        return Contexts(1, num_blocks, first)
    return Contexts(len(tables), num_blocks, torch.tensor(tables, device=layout.device).flatten())


def _row_mask(rows: list[_Row], length: int, layout: Layout) -> torch.Tensor:
    """[n, 1, 1, L]"""
    bounds = torch.tensor([(row.first - row.base, row.end - row.base) for row in rows], device=layout.device)
    places = torch.arange(length, device=layout.device)
    seen = (places >= bounds[:, :1]) & (places < bounds[:, 1:])
    return _additive(seen, layout.dtype)[:, None, None, :]


def _chunk_mask(chunk: Chunk, first: int, layout: Layout) -> torch.Tensor:
    """[Q, C]: causal, and within the window."""
    keys = torch.arange(first, chunk.end, device=layout.device)
    queries = torch.arange(chunk.start, chunk.end, device=layout.device)[:, None]
    seen = keys <= queries
    if layout.window:
        seen &= keys > queries - layout.window
    return _additive(seen, layout.dtype)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
