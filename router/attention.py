"""Paged attention, the first of the three seams: the model's attention over the engine's own KV blocks.

`transformers` calls `paged_attention` for every layer with the rotated queries, keys and values of the packed batch;
the step's `AttentionStep` reaches it as a keyword argument of the model's forward.

Shapes: T tokens, H query heads, G key/value heads, R = H / G query heads per key/value head, d head size; B, L, Q, C as
in batch.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from router.batch import DecodeGroup, PackedBatch, PrefillChunk
from router.kv_cache import KVCache
from router.phases import PhaseClock

NAME = "moesaic_paged"


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What attention needs to know of the step."""

    batch: PackedBatch
    cache: KVCache
    clock: PhaseClock


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: AttentionStep,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, d], key and value [1, G, T, d] -> ([1, T, H, d], None). Masks are the batch's own."""
    started = time.perf_counter()
    layer: int = module.layer_idx  # type: ignore[assignment]
    batch, cache = step.batch, step.cache
    cache.write(layer, batch.cache_positions, key[0].transpose(0, 1), value[0].transpose(0, 1))
    queries = query[0].transpose(0, 1)
    output = torch.empty_like(queries)
    keys, values = cache.keys[layer], cache.values[layer]
    if batch.decode is not None:
        output[batch.decode.rows] = _decode(queries, keys, values, batch.decode, scaling)
    for chunk in batch.prefill:
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
        output[rows] = _prefill(queries[rows], keys, values, chunk, scaling)
    step.clock.add("attention", time.perf_counter() - started)
    return output[None], None


def _decode(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: DecodeGroup,
    scaling: float,
) -> torch.Tensor:
    """One token of each sequence, [B, H, d]: the heads that share keys stand where tokens usually do."""
    picked = queries[group.rows]
    num_sequences, num_heads, head_dim = picked.shape
    attended = functional.scaled_dot_product_attention(
        picked.view(num_sequences, keys.shape[1], -1, head_dim),  # [B, G, R, d]
        keys[group.positions].transpose(1, 2),  # [B, G, L, d]
        values[group.positions].transpose(1, 2),
        attn_mask=group.visible[:, None, None, :],
        scale=scaling,
    )
    return attended.reshape(num_sequences, num_heads, head_dim)


def _prefill(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: PrefillChunk,
    scaling: float,
) -> torch.Tensor:
    """Several tokens of one sequence, [Q, H, d]."""
    num_tokens, num_heads, head_dim = queries.shape
    num_shared = num_heads // keys.shape[1]
    attended = functional.scaled_dot_product_attention(
        queries.transpose(0, 1).reshape(-1, num_shared * num_tokens, head_dim),  # [G, R * Q, d]
        keys[chunk.positions].transpose(0, 1),  # [G, C, d]
        values[chunk.positions].transpose(0, 1),
        attn_mask=chunk.visible.repeat(num_shared, 1),
        scale=scaling,
    )
    return attended.reshape(num_heads, num_tokens, head_dim).transpose(0, 1)


def register() -> None:
    """Makes the seam known to transformers; masks are built per chunk, so the model builds none."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
