"""Paged attention: the rows of a packed batch over the engine's own KV blocks.

Heads that share keys stand where tokens usually do, so no key is ever repeated in memory.

Shapes: T tokens, H query heads, G key/value heads, R = H / G query heads per key/value head, d head size; n, L, Q, C as
in batch.py.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from router.batch import DecodeGroup, PackedBatch, PrefillChunk
from router.kv_cache import KVCache

# With fewer rows the bits of a CPU's product depend on where its operands, and the buffers of its threads, lie in memory.
_FEWEST_INVARIANT = 4


def attend(
    layer: int, queries: torch.Tensor, batch: PackedBatch, cache: KVCache, scaling: float
) -> torch.Tensor:
    """queries [T, H, d] -> [T, H * d]; the batch's own keys and values are in the cache already."""
    if len(batch.decode) == 1 and not batch.prefill:
        (group,) = batch.decode
        if isinstance(group.rows, slice):
            return _decode(layer, queries, group, cache, scaling)
    num_tokens, num_heads, head_dim = queries.shape
    output = queries.new_empty(num_tokens, num_heads * head_dim)
    for group in batch.decode:
        output[group.rows] = _decode(layer, queries[group.rows], group, cache, scaling)
    for chunk in batch.prefill:
        output[chunk.rows] = _prefill(layer, queries[chunk.rows], chunk, cache, scaling)
    return output


def _decode(
    layer: int, queries: torch.Tensor, group: DecodeGroup, cache: KVCache, scaling: float
) -> torch.Tensor:
    """One token of each context: [n, H, d] -> [n, H * d]."""
    num_rows, num_heads, head_dim = queries.shape
    keys, values = cache.read(layer, group.contexts, group.span)  # [n or 1, G, L, d]
    if len(keys) != num_rows:
        keys, values = keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1)
    queries = queries.view(num_rows, keys.shape[1], -1, head_dim)  # [n, G, R, d]
    num_shared = queries.shape[2]
    if group.invariant:
        queries = functional.pad(queries, (0, 0, 0, max(0, _FEWEST_INVARIANT - num_shared)))
    attended = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=group.mask, scale=scaling
    )[:, :, :num_shared]
    return attended.reshape(num_rows, num_heads * head_dim)


def _prefill(
    layer: int, queries: torch.Tensor, chunk: PrefillChunk, cache: KVCache, scaling: float
) -> torch.Tensor:
    """Several tokens of one context: [Q, H, d] -> [Q, H * d]."""
    num_tokens, num_heads, head_dim = queries.shape
    keys, values = cache.read(layer, chunk.contexts, chunk.span)  # [1, G, C, d]
    num_shared = num_heads // keys.shape[1]
    attended = functional.scaled_dot_product_attention(
        queries.unflatten(1, (-1, num_shared)).permute(1, 2, 0, 3),  # [G, R, Q, d]
        keys.transpose(0, 1).expand(-1, num_shared, -1, -1),
        values.transpose(0, 1).expand(-1, num_shared, -1, -1),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scaling,
    )
    return attended.permute(2, 0, 1, 3).reshape(num_tokens, num_heads * head_dim)
