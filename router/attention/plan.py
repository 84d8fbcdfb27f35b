"""Which calls attend a packed batch in the layers of one view: rows that decode in groups, prompts in parts.

Masks of all parts are slices of one band: which keys a token sees depends on how far they lie behind it. So a step
never holds more of them than the queries of one call times the longest context.

Shapes: n rows that are attended in one call, b blocks of each of their contexts, L positions of these blocks that count,
C those of a chunk's context, Q query tokens of a part, P the most positions that any part sees before its first query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from router.attention.views import AttentionLayout, View
from router.cache.kv_cache import Contexts
from router.scheduling.sequence import Chunk

# On a CPU a call copies its contexts together first: so many positions stay in its last cache until they are read.
_CALL_POSITIONS = {"cpu": 4096}
# Queries of a prefill call on a CPU. Each call reads the context up to its own end, where one call would read all of it.
_CALL_QUERIES = {"cpu": 128}
# Attending to this much padding costs what another call does.
_CALL_COST_POSITIONS = 256
# In a batch-invariant step contexts end at multiples of this, counted from where they begin.
TILE_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows that are attended one token each, against contexts of one length."""

    rows: slice | torch.Tensor  # n rows of the batch
    contexts: Contexts  # n, or one that all rows share
    span: slice  # L of the b * block_tokens positions
    mask: torch.Tensor | None  # [n, 1 or H, 1, L], added to the scores
    invariant: bool  # whether other rows may not reach the last bits of any


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Q consecutive tokens that are attended in one call."""

    queries: slice  # Q rows of their chunk
    keys: slice  # of the C positions of its context
    mask: torch.Tensor | None  # [Q, keys], added to the scores; None: plainly causal


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence, whose context is read once."""

    rows: slice
    contexts: Contexts
    span: slice  # C of the b * block_tokens positions
    parts: tuple[PrefillPart, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Every row of the batch is in one group or in one chunk."""

    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]


@dataclass(frozen=True, slots=True)
class Row:
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


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive positions [start, end) of a sequence that are attended together, over [base, base + length)."""

    start: int
    end: int
    base: int
    length: int

    @property
    def num_queries(self) -> int:
        return self.end - self.start


def plan_attention(placed: list[tuple[Chunk, int]], view: View, layout: AttentionLayout) -> AttentionPlan:
    """The calls for chunks that begin at these rows of the batch."""
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
    """The calls for rows that are attended by themselves. `bias` [H, P]: what each head adds to the scores of keys so
    far before the last that a row sees."""
    grouped = _group_by_length(rows, layout.device)
    return tuple(_decode_group(group, layout, bias) for group in grouped)


def _decode_row(chunk: Chunk, row: int, view: View, layout: AttentionLayout) -> Row:
    first = view.first(chunk.start)
    base = first - first % layout.block_tokens
    blocks = chunk.sequence.blocks[base // layout.block_tokens : -(-chunk.end // layout.block_tokens)]
    return Row(row, blocks, base, chunk.end - base, first, chunk.end)


def _group_by_length(rows: list[Row], device: torch.device) -> Iterator[list[Row]]:
    """Rows whose contexts are read together: as many as make a good call, not much longer than one another."""
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
    """A chunk in calls: none goes on where the tokens of the view's next chunk begin."""
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
    """Whether each token sees just those of the run up to itself."""
    return run.base == run.start and (view.window is None or run.num_queries <= view.window)


def _tiled_groups(
    placed: list[tuple[Chunk, int]], view: View, layout: AttentionLayout
) -> Iterator[DecodeGroup]:
    """For every row a call whose shape its position alone decides. Rows of a sequence that see the same tiles share
    theirs: in a call every row is a product of its own."""
    runs = [list(_tiled_runs(chunk, view)) for chunk, _ in placed]
    band = _Band.over([run for of_chunk in runs for run in of_chunk], view, layout)
    for (chunk, first_row), of_chunk in zip(placed, runs, strict=True):
        for run in of_chunk:
            yield _tiled_group(run, chunk, first_row + run.start - chunk.start, band, layout)


def _tiled_runs(chunk: Chunk, view: View) -> Iterator[_Run]:
    """Positions that see tiles of the same number from the same place on."""
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
        # Always copied together: the last bits of a product may depend on where in memory its operands lie.
        Contexts(1, num_blocks, _table(table, layout)),
        slice(skipped, skipped + run.length),
        band.mask(run)[:, None, None, :],
        invariant=True,
    )


@dataclass(frozen=True, slots=True)
class _Band:
    """What the queries of a run see, added to the scores: [Q, P + L]. Its first query stands at column P."""

    rows: torch.Tensor
    most_before: int

    @classmethod
    def over(cls, runs: list[_Run], view: View, layout: AttentionLayout) -> _Band:
        """Wide and high enough for all these runs."""
        before = max((run.start - run.base for run in runs), default=0)
        after = max((run.base + run.length - run.start for run in runs), default=0)
        behind = torch.arange(after, device=layout.device)
        places = torch.arange(-before, after, device=layout.device)
        queries = behind[: max((run.num_queries for run in runs), default=0), None]
        seen = places <= queries
        if view.window is not None:
            seen &= places > queries - view.window
        return cls(_additive(seen, layout.dtype), before)

    def mask(self, run: _Run) -> torch.Tensor:
        """[Q, length]"""
        first = self.most_before - (run.start - run.base)
        mask = self.rows[: run.num_queries, first : first + run.length]
        # Kernels of other devices read masks in steps of several numbers.
        return mask if mask.device.type == "cpu" else mask.contiguous()


def _row_index(rows: list[Row], layout: AttentionLayout) -> slice | torch.Tensor:
    numbers = [row.row for row in rows]
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers).to(layout.device)


def _contexts(tables: Sequence[Sequence[int]], layout: AttentionLayout) -> Contexts:
    """Contexts of the same number of blocks each. A single one whose blocks lie in a row is read where it is."""
    first, num_blocks = tables[0][0], len(tables[0])
    if len(tables) == 1 and list(tables[0]) == list(range(first, first + num_blocks)):
        return Contexts(1, num_blocks, first)
    return Contexts(len(tables), num_blocks, _table(tables, layout).flatten())


def _table(blocks: Sequence[int] | Sequence[Sequence[int]], layout: AttentionLayout) -> torch.Tensor:
    return torch.from_numpy(np.array(blocks)).to(layout.device)


def _row_mask(
    rows: list[Row], length: int, layout: AttentionLayout, bias: torch.Tensor | None
) -> torch.Tensor:
    """[n, 1, 1, L], or with a bias [n, H, 1, L]."""
    bounds = torch.tensor([(row.first - row.base, row.end - row.base) for row in rows]).to(layout.device)
    places = torch.arange(length, device=layout.device)
    seen = (places >= bounds[:, :1]) & (places < bounds[:, 1:])
    mask = _additive(seen, layout.dtype)[:, None, None, :]
    if bias is None:
        return mask
    before = (bounds[:, 1:] - 1 - places).clamp_(min=0)
    return mask + bias[:, before].transpose(0, 1)[:, :, None, :]


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
