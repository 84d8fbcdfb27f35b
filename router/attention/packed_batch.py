"""The tensors that one step runs: chunks of sequences packed one after another, without padding.

They are laid out once a step, so that no layer has to repeat that work.

Shapes: T tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from router.attention.plan import AttentionPlan, plan_attention
from router.attention.views import AttentionLayout
from router.scheduling.sequence import Chunk


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The inputs of the model for one step, or for one of its micro-batches."""

    chunks: tuple[Chunk, ...]
    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T] the position of each token in its sequence
    cache_positions: torch.Tensor  # [T] where the keys and values of each token go
    first_rows: tuple[int, ...]  # the first row of each chunk
    plans: tuple[AttentionPlan, ...]  # one for each view
    view_of: Mapping[int, int]  # the index of the view of each layer that attends

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[1]

    def plan(self, layer: int) -> AttentionPlan:
        """How a layer attends to this batch."""
        return self.plans[self.view_of[layer]]


def pack(chunks: tuple[Chunk, ...], layout: AttentionLayout) -> PackedBatch:
    """Lays out the chunks of a step as tensors."""
    token_ids: list[int] = []
    positions: list[int] = []
    cache_positions: list[int] = []
    first_rows: list[int] = []
    for chunk in chunks:
        first_rows.append(len(token_ids))
        token_ids.extend(chunk.sequence.tokens[chunk.start : chunk.end])
        positions.extend(range(chunk.start, chunk.end))
        cache_positions.extend(_cache_positions(chunk, layout.block_tokens))
    rows = torch.tensor([token_ids, positions, cache_positions]).to(layout.device)
    placed = list(zip(chunks, first_rows, strict=True))
    return PackedBatch(
        chunks=chunks,
        token_ids=rows[:1],
        positions=rows[1:2],
        cache_positions=rows[2],
        first_rows=tuple(first_rows),
        plans=tuple(plan_attention(placed, view, layout) for view in layout.views),
        view_of=layout.view_of,
    )


def _cache_positions(chunk: Chunk, block_tokens: int) -> Iterable[int]:
    first = chunk.start // block_tokens
    blocks = chunk.sequence.blocks[first : -(-chunk.end // block_tokens)]
    if chunk.num_tokens == 1:
        return (blocks[0] * block_tokens + chunk.start % block_tokens,)
    positions = np.arange(chunk.start, chunk.end)
    found: list[int] = (
        np.asarray(blocks)[positions // block_tokens - first] * block_tokens + positions % block_tokens
    ).tolist()
    return found
