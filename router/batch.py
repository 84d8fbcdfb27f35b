"""What one step runs, as tensors: sequences packed one after another, without padding.

Shapes: T tokens of the batch, B sequences that decode one token, L longest of their contexts, Q query tokens of a
chunk, C its context length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from router.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """All chunks of one token, attended together."""

    rows: torch.Tensor  # [B] rows of the batch
    positions: torch.Tensor  # [B, L] cache positions of each context, padded with any valid one
    visible: torch.Tensor  # [B, L] bool, whether that position is part of the context


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One chunk of several tokens."""

    first_row: int
    num_tokens: int
    positions: torch.Tensor  # [C] cache positions of the whole context, this chunk included
    visible: torch.Tensor  # [Q, C] bool, causal and within the window


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Inputs of the model for one step."""

    chunks: tuple[Chunk, ...]
    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T] place of each token in its sequence
    cache_positions: torch.Tensor  # [T] where its keys and values go
    decode: DecodeGroup | None
    prefill: tuple[PrefillChunk, ...]
    first_rows: tuple[int, ...]  # of each chunk

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[1]


def pack(
    chunks: tuple[Chunk, ...], *, block_tokens: int, window: int | None, device: torch.device
) -> PackedBatch:
    """Lays the chunks of a step out as tensors. `window` is the sliding window W: a token sees W tokens, its own
    included; None sees all before it."""
    token_ids: list[int] = []
    positions: list[int] = []
    first_rows: list[int] = []
    contexts: list[torch.Tensor] = []
    for chunk in chunks:
        first_rows.append(len(token_ids))
        token_ids.extend(chunk.sequence.tokens[chunk.start : chunk.end])
        positions.extend(range(chunk.start, chunk.end))
        contexts.append(_context(chunk, block_tokens))
    places = list(zip(chunks, first_rows, contexts, strict=True))
    return PackedBatch(
        chunks=chunks,
        token_ids=torch.tensor([token_ids], device=device),
        positions=torch.tensor([positions], device=device),
        cache_positions=torch.cat([context[-chunk.num_tokens :] for chunk, _, context in places]).to(device),
        decode=_decode_group([place for place in places if place[0].num_tokens == 1], window, device),
        prefill=tuple(_prefill_chunk(*place, window, device) for place in places if place[0].num_tokens > 1),
        first_rows=tuple(first_rows),
    )


def _context(chunk: Chunk, block_tokens: int) -> torch.Tensor:
    """Cache positions [C] of a sequence's tokens up to the chunk's end."""
    blocks = torch.tensor(chunk.sequence.blocks)
    return (blocks[:, None] * block_tokens + torch.arange(block_tokens)).flatten()[: chunk.end]


def _decode_group(
    places: list[tuple[Chunk, int, torch.Tensor]], window: int | None, device: torch.device
) -> DecodeGroup | None:
    if not places:
        return None
    contexts = [context[-window:] if window else context for _, _, context in places]
    lengths = torch.tensor([len(context) for context in contexts])
    longest = int(lengths.max())
    positions = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    return DecodeGroup(
        rows=torch.tensor([row for _, row, _ in places], device=device),
        positions=positions.to(device),
        visible=(torch.arange(longest) < lengths[:, None]).to(device),
    )


def _prefill_chunk(
    chunk: Chunk, first_row: int, context: torch.Tensor, window: int | None, device: torch.device
) -> PrefillChunk:
    first_key = max(0, chunk.start - window + 1) if window else 0
    keys = torch.arange(first_key, chunk.end)
    queries = torch.arange(chunk.start, chunk.end)[:, None]
    visible = keys <= queries
    if window:
        visible &= keys > queries - window
    return PrefillChunk(first_row, chunk.num_tokens, context[first_key:].to(device), visible.to(device))
