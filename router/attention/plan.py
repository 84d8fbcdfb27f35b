"""Plans the calls that attend a packed batch in one view: rows that decode in groups, prompts in parts.

Which keys a token sees depends only on how far they lie behind it, so the masks of all parts are slices of
one band. A step therefore never holds more mask than the queries of one call times the longest context.

Shapes: n rows that are attended in one call, b blocks of each of their contexts, L positions of these blocks
that are used, C those of a chunk's context, Q query tokens of a part, P the most positions that any part sees
before its first query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from router.attention.views import AttentionLayout, View
from router.cache.kv_cache import Contexts
from router.scheduling.sequence import Chunk

# The most positions of a decoding call. On a CPU it first copies its contexts together, and so many stay in
# the last-level cache until they are read.
_CALL_POSITIONS = {"cpu": 4096}
# The most queries of a prefill call. On a CPU each call reads the context up to its own end, where a single
# call would read all of it for every query.
_CALL_QUERIES = {"cpu": 128}
# The number of padded positions that costs as much as another call.
_CALL_COST_POSITIONS = 256
# In a batch-invariant step the length of every context is a multiple of this.
TILE_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows that are attended in one call, one token each, with contexts of one length."""

    rows: slice | torch.Tensor  # n rows of the batch
    contexts: Contexts  # n, or one that all rows share
    span: slice  # L of the b * block_tokens positions
    mask: torch.Tensor | None  # [n, 1 or H, 1, L], added to the scores
    invariant: bool  # whether no row may depend on others, not even in its last bits


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Q consecutive tokens that are attended in one call."""

    queries: slice  # Q rows of their chunk
    keys: slice  # of the C positions of its context
    mask: torch.Tensor | None  # [Q, keys], added to the scores; None: causal without any other bound


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence, for which its context is read once."""

    rows: slice
    contexts: Contexts
    span: slice  # C of the b * block_tokens positions
    parts: tuple[PrefillPart, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How a batch is attended. Every row of it is in one group or in one chunk."""

    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A row that is attended by itself. It sees the positions [first, end) of its sequence."""

    row: int
    blocks: Sequence[int]  # the blocks that hold [base, base + length)
    base: int
    length: int
    first: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether it sees all of [base, base + length), so that no mask is needed."""
        return (self.first, self.end) == (self.base, self.base + self.length)


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive positions [start, end) of a sequence, attended in one call to [base, base + length)."""

    start: int
    end: int
    base: int
    length: int

    @property
    def num_queries(self) -> int:
        return self.end - self.start


def plan_attention(placed: list[tuple[Chunk, int]], view: View, layout: AttentionLayout) -> AttentionPlan:
    """The calls for chunks, each with the row of the batch at which it begins."""
    if layout.invariant:
        return AttentionPlan(tuple(_tiled_groups(placed, view, layout)), ())
    single = [_decode_row(chunk, row, view, layout) for chunk, row in placed if chunk.num_tokens == 1]
    decode = decode_groups(single, layout)
    several = [(chunk, row) for chunk, row in placed if chunk.num_tokens > 1]
    prefill = tuple(_prefill_chunks(several, view, layout)) if several else ()
    return AttentionPlan(decode, prefill)


def decode_groups(
    rows: list[Row], layout: AttentionLayout, *, bias: torch.Tensor | None = None
) -> tuple[DecodeGroup, ...]:
    """The calls for rows that are attended by themselves. `bias` [H, P] is added to the scores of each head,
    by how far a key lies before the last one that the row sees."""
    grouped = _group_by_length(rows, layout.device)
    return tuple(_decode_group(group, layout, bias) for group in grouped)


def _decode_row(chunk: Chunk, row: int, view: View, layout: AttentionLayout) -> Row:
    first = view.first(chunk.start)
    base = first - first % layout.block_tokens
    blocks = chunk.sequence.blocks[base // layout.block_tokens : -(-chunk.end // layout.block_tokens)]
    return Row(row, blocks, base, chunk.end - base, first, chunk.end)


def _group_by_length(rows: list[Row], device: torch.device) -> Iterator[list[Row]]:
    """Groups of rows whose contexts are read together: no more than fit a call, and of similar lengths."""
    most = _CALL_POSITIONS.get(device.type)
    group: list[Row] = []
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


def _decode_group(rows: list[Row], layout: AttentionLayout, bias: torch.Tensor | None) -> DecodeGroup:
    rows = sorted(rows, key=lambda row: row.row)
    longest = max(row.length for row in rows)
    if len(rows) == 1 and bias is None:
        (alone,) = rows
        span = slice(alone.first - alone.base, alone.length)
        return DecodeGroup(_row_index(rows, layout), _contexts([alone.blocks], layout), span, None, False)
    num_blocks = max(len(row.blocks) for row in rows)
    tables = [[*row.blocks, *[0] * (num_blocks - len(row.blocks))] for row in rows]
    mask = None
    if bias is not None or not all(row.whole and row.length == longest for row in rows):
        mask = _row_mask(rows, longest, layout, bias)
    return DecodeGroup(
        _row_index(rows, layout), _contexts(tables, layout), slice(0, longest), mask, invariant=False
    )


def _prefill_chunks(
    placed: list[tuple[Chunk, int]], view: View, layout: AttentionLayout
) -> Iterator[PrefillChunk]:
    runs = [list(_runs(chunk, view, layout)) for chunk, _ in placed]
    band = _Band.over(
        [run for of_chunk in runs for run in of_chunk if not _is_causal(run, view)], view, layout
    )
    for (chunk, first_row), of_chunk in zip(placed, runs, strict=True):
        first = of_chunk[0].base
        first_block, skipped = divmod(first, layout.block_tokens)
        blocks = chunk.sequence.blocks[first_block : -(-chunk.end // layout.block_tokens)]
        parts = (
            PrefillPart(
                slice(run.start - chunk.start, run.end - chunk.start),
                slice(run.base - first, run.end - first),
                None if _is_causal(run, view) else band.mask(run),
            )
            for run in of_chunk
        )
        yield PrefillChunk(
            slice(first_row, first_row + chunk.num_tokens),
            _contexts([blocks], layout),
            slice(skipped, skipped + chunk.end - first),
            tuple(parts),
        )


def _runs(chunk: Chunk, view: View, layout: AttentionLayout) -> Iterator[_Run]:
    """The calls of a chunk. None of them crosses the boundary between two chunks of the view."""
    most = _CALL_QUERIES.get(layout.device.type, chunk.num_tokens)
    start = chunk.start
    while start < chunk.end:
        end = min(start + most, chunk.end)
        if view.chunk is not None:
            end = min(end, view.origin(start) + view.chunk)
        base = view.first(start)
        yield _Run(start, end, base, end - base)
        start = end


def _is_causal(run: _Run, view: View) -> bool:
    """Whether each token sees exactly the tokens of the run up to itself."""
    return run.base == run.start and (view.window is None or run.num_queries <= view.window)


def _tiled_groups(
    placed: list[tuple[Chunk, int]], view: View, layout: AttentionLayout
) -> Iterator[DecodeGroup]:
    """Calls whose shape is decided by the positions of their rows alone. Rows of a sequence that see the same
    tiles share a call, in which every row is still a product of its own."""
    runs = [list(_tiled_runs(chunk, view)) for chunk, _ in placed]
    band = _Band.over([run for of_chunk in runs for run in of_chunk], view, layout)
    for (chunk, first_row), of_chunk in zip(placed, runs, strict=True):
        for run in of_chunk:
            yield _tiled_group(run, chunk, first_row + run.start - chunk.start, band, layout)


def _tiled_runs(chunk: Chunk, view: View) -> Iterator[_Run]:
    """Runs of positions that see the same number of tiles from the same position on."""
    start = chunk.start
    while start < chunk.end:
        first, origin = view.first(start), view.origin(start)
        base = first - (first - origin) % TILE_POSITIONS
        length = -(-(start + 1 - base) // TILE_POSITIONS) * TILE_POSITIONS
        ends = [chunk.end, base + length]
        if view.window is not None:
            ends.append(base + TILE_POSITIONS + view.window - 1)
        if view.chunk is not None:
            ends.append(origin + view.chunk)
        yield _Run(start, min(ends), base, length)
        start = min(ends)


def _tiled_group(
    run: _Run, chunk: Chunk, first_row: int, band: _Band, layout: AttentionLayout
) -> DecodeGroup:
    first_block, skipped = divmod(run.base, layout.block_tokens)
    num_blocks = -(-(skipped + run.length) // layout.block_tokens)
    blocks = chunk.sequence.blocks[first_block : first_block + num_blocks]
    table = [*blocks, *[0] * (num_blocks - len(blocks))]
    return DecodeGroup(
        slice(first_row, first_row + run.num_queries),
        # Always a copy: the last bits of a product may depend on where in memory its operands lie.
        Contexts(1, num_blocks, _table(table, layout)),
        slice(skipped, skipped + run.length),
        band.mask(run)[:, None, None, :],
        invariant=True,
    )


@dataclass(frozen=True, slots=True)
class _Band:
    """The mask of any run, added to the scores: [Q, P + L]. The first query is at column P."""

    rows: torch.Tensor
    most_before: int

    @classmethod
    def over(cls, runs: list[_Run], view: View, layout: AttentionLayout) -> _Band:
        """A band large enough for all these runs."""
        before = max((run.start - run.base for run in runs), default=0)
        after = max((run.base + run.length - run.start for run in runs), default=0)
        behind = torch.arange(after, device=layout.device)
        keys = torch.arange(-before, after, device=layout.device)
        queries = behind[: max((run.num_queries for run in runs), default=0), None]
        seen = keys <= queries
        if view.window is not None:
            seen &= keys > queries - view.window
        return cls(_additive(seen, layout.dtype), before)

    def mask(self, run: _Run) -> torch.Tensor:
        """The mask of a run, [Q, length]."""
        first = self.most_before - (run.start - run.base)
        mask = self.rows[: run.num_queries, first : first + run.length]
        # Kernels of other devices read a mask several numbers at a time.
        return mask if mask.device.type == "cpu" else mask.contiguous()


def _row_index(rows: list[Row], layout: AttentionLayout) -> slice | torch.Tensor:
    numbers = [row.row for row in rows]
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers).to(layout.device)


def _contexts(tables: Sequence[Sequence[int]], layout: AttentionLayout) -> Contexts:
    """Contexts of the same number of blocks each. A single one with consecutive blocks is read in place."""
    first, num_blocks = tables[0][0], len(tables[0])
    if len(tables) == 1 and list(tables[0]) == list(range(first, first + num_blocks)):
        return Contexts(1, num_blocks, first)
    return Contexts(len(tables), num_blocks, _table(tables, layout).flatten())


def _table(blocks: Sequence[int] | Sequence[Sequence[int]], layout: AttentionLayout) -> torch.Tensor:
    return torch.from_numpy(np.array(blocks)).to(layout.device)


def _row_mask(
    rows: list[Row], length: int, layout: AttentionLayout, bias: torch.Tensor | None
) -> torch.Tensor:
    """The mask of rows, [n, 1, 1, L], or [n, H, 1, L] with a bias."""
    bounds = torch.tensor([(row.first - row.base, row.end - row.base) for row in rows]).to(layout.device)
    keys = torch.arange(length, device=layout.device)
    seen = (keys >= bounds[:, :1]) & (keys < bounds[:, 1:])
    mask = _additive(seen, layout.dtype)[:, None, None, :]
    if bias is None:
        return mask
    before = (bounds[:, 1:] - 1 - keys).clamp_(min=0)
    return mask + bias[:, before].transpose(0, 1)[:, :, None, :]


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
