"""A packed batch as an encoder-decoder sees it: its prompts, which the encoder reads as a whole, and the rows that the
decoder runs.

The first row of the decoder, its start token, has the position of the prompt's last token, because that is the row whose
logits predict the next token. After a prompt of n tokens, the i-th generated token (from 0) has the position n + i. So the
keys and values of cross-attention have the positions [0, n), and those of self-attention begin at n - 1.

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
    """The tokens of all prompts of a batch, one prompt after the other."""

    tokens: list[int]  # [S], rows of the batch
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
    """The rows that the decoder runs, in the order of the batch."""

    tokens: list[int]  # [U], rows of the batch
    token_ids: torch.Tensor  # [U]
    positions: torch.Tensor  # [U], counted from the start token
    cache_positions: torch.Tensor  # [U]
    self_attention: tuple[DecodeGroup, ...]
    cross_attention: tuple[DecodeGroup, ...]

    @classmethod
    def of(
        cls, batch: PackedBatch, layout: AttentionLayout, *, start_token: int, bias: torch.Tensor | None
    ) -> DecoderRows:
        """`bias` [H, P]: what self-attention adds to a score, by how far the key lies before the query."""
        tokens: list[int] = []
        token_ids: list[int] = []
        positions: list[int] = []
        self_rows: list[Row] = []
        cross_rows: list[Row] = []
        for chunk, first_row in zip(batch.chunks, batch.first_rows, strict=True):
            sequence, length = chunk.sequence, chunk.sequence.num_prompt_tokens
            for position in range(max(chunk.start, length - 1), chunk.end):
                self_rows.append(_row(len(tokens), chunk, length - 1, position + 1, layout))
                cross_rows.append(_row(len(tokens), chunk, 0, length, layout))
                tokens.append(first_row + position - chunk.start)
                token_ids.append(start_token if position < length else sequence.tokens[position])
                positions.append(position - length + 1)
        ids, from_start, rows = torch.tensor([token_ids, positions, tokens]).to(layout.device)
        return cls(
            tokens,
            ids,
            from_start,
            batch.cache_positions[rows],
            decode_groups(self_rows, layout, bias=bias),
            decode_groups(cross_rows, layout),
        )

    def index_of(self, wanted: Sequence[int]) -> list[int]:
        """The indices of rows of the batch among the rows of the decoder."""
        indices = {token: index for index, token in enumerate(self.tokens)}
        return [indices[token] for token in wanted]


def _row(row: int, chunk: Chunk, first: int, end: int, layout: AttentionLayout) -> Row:
    """A row that attends to the positions [first, end) of its sequence."""
    first_block = first // layout.block_tokens
    base = first_block * layout.block_tokens
    blocks = chunk.sequence.blocks[first_block : -(-end // layout.block_tokens)]
    return Row(row, blocks, base, end - base, first, end)
