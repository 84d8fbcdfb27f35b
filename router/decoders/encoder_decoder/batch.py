"""A packed batch as an encoder-decoder sees it: the prompts in it, which the encoder reads whole, and the rows that the
decoder runs.

The first row of a decoder, its start token, stands in the place of the prompt's last token, whose row predicts what
comes next; the token that is generated i-th (from 0) stands in its own place, i behind the prompt. So a prompt of n
tokens leaves cross-attention's keys and values in the places [0, n), and self-attention's begin at n - 1.

Shapes: T tokens of the batch, S of prompts, U rows of the decoder, H heads, P positions that can be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from router.attention.packed_batch import PackedBatch
from router.attention.plan import DecodeGroup, Row, decode_groups
from router.attention.views import AttentionLayout
from router.scheduling.sequence import Chunk


@dataclass(frozen=True, slots=True, eq=False)
class PromptRows:
    """The prompts of a batch, one behind the other."""

    tokens: list[int]  # S rows of the batch
    token_ids: torch.Tensor  # [S]
    cache_positions: torch.Tensor  # [S]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, batch: PackedBatch) -> PromptRows:
        tokens: list[int] = []
        lengths: list[int] = []
        for chunk, first in zip(batch.chunks, batch.first_rows, strict=True):
            length = chunk.sequence.num_prompt_tokens
            if chunk.start < length:
                assert chunk.start == 0 and chunk.end >= length, "a prompt was cut"
                tokens += range(first, first + length)
                lengths.append(length)
        rows = torch.tensor(tokens, dtype=torch.long).to(batch.token_ids.device)
        return cls(tokens, batch.token_ids[0][rows], batch.cache_positions[rows], tuple(lengths))


@dataclass(frozen=True, slots=True, eq=False)
class DecoderRows:
    """What the decoder runs, in the order of the batch."""

    tokens: list[int]  # U rows of the batch
    token_ids: torch.Tensor  # [U]
    places: torch.Tensor  # [U] counted from the start token
    cache_positions: torch.Tensor  # [U]
    own: tuple[DecodeGroup, ...]
    cross: tuple[DecodeGroup, ...]

    @classmethod
    def of(
        cls, batch: PackedBatch, layout: AttentionLayout, *, start_token: int, bias: torch.Tensor | None
    ) -> DecoderRows:
        """`bias` [H, P]: of self-attention, by how far a key lies back."""
        tokens: list[int] = []
        token_ids: list[int] = []
        places: list[int] = []
        own: list[Row] = []
        cross: list[Row] = []
        for chunk, first_row in zip(batch.chunks, batch.first_rows, strict=True):
            sequence, length = chunk.sequence, chunk.sequence.num_prompt_tokens
            for position in range(max(chunk.start, length - 1), chunk.end):
                own.append(_row(len(tokens), chunk, length - 1, position + 1, layout))
                cross.append(_row(len(tokens), chunk, 0, length, layout))
                tokens.append(first_row + position - chunk.start)
                token_ids.append(start_token if position < length else sequence.tokens[position])
                places.append(position - length + 1)
        ids, its_places, rows = torch.tensor([token_ids, places, tokens]).to(layout.device)
        return cls(
            tokens,
            ids,
            its_places,
            batch.cache_positions[rows],
            decode_groups(own, layout, bias=bias),
            decode_groups(cross, layout),
        )

    def index_of(self, wanted: Sequence[int]) -> list[int]:
        """Where rows of the batch stand among those of the decoder."""
        place_of = {token: index for index, token in enumerate(self.tokens)}
        return [place_of[token] for token in wanted]


def _row(row: int, chunk: Chunk, first: int, end: int, layout: AttentionLayout) -> Row:
    """One that sees the positions [first, end) of its sequence."""
    first_block = first // layout.block_tokens
    base = first_block * layout.block_tokens
    blocks = chunk.sequence.blocks[first_block : -(-end // layout.block_tokens)]
    return Row(row, blocks, base, end - base, first, end)
