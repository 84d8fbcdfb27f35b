"""Paged attention: the rows of a packed batch over the engine's own KV blocks.

Query heads that share keys take the axis of tokens, so that no key is ever repeated in memory.

Shapes: T tokens, H query heads, G key/value heads, R = H / G query heads per key/value head, d head size; n,
L, Q, C as in plan.py; K keys of a call.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from router.attention.packed_batch import PackedBatch
from router.attention.plan import DecodeGroup, PrefillChunk
from router.cache.kv_cache import KVCache

# The fewest rows with which the bits of a product on a CPU do not depend on where its operands and the
# buffers of its threads lie in memory.
_FEWEST_INVARIANT = 4
# The most scores that are held in memory at a time, where they have to be.
_MOST_SCORES = 1 << 27


def attend(
    layer: int,
    queries: torch.Tensor,
    batch: PackedBatch,
    cache: KVCache,
    scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """queries [T, H, d] -> [T, H * d]. The batch's own keys and values are in the cache already.

    `sinks` [H] holds a score for each head that takes part in the softmax and has no value.
    """
    plan = batch.plan(layer)
    if len(plan.decode) == 1 and not plan.prefill:
        (group,) = plan.decode
        if isinstance(group.rows, slice):
            return attend_group(layer, queries, group, cache, scaling, sinks)
    num_tokens, num_heads, head_dim = queries.shape
    output = queries.new_empty(num_tokens, num_heads * head_dim)
    for group in plan.decode:
        output[group.rows] = attend_group(layer, queries[group.rows], group, cache, scaling, sinks)
    for chunk in plan.prefill:
        attend_chunk(layer, queries[chunk.rows], chunk, cache, scaling, sinks, output[chunk.rows])
    return output


def attend_group(
    layer: int,
    queries: torch.Tensor,
    group: DecodeGroup,
    cache: KVCache,
    scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends one token to each context: [n, H, d] -> [n, H * d]."""
    num_rows, num_heads, head_dim = queries.shape
    keys, values = cache.read(layer, group.contexts, group.span)  # [n or 1, G, L, d]
    if len(keys) != num_rows:
        keys, values = keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1)
    num_kv_heads = keys.shape[1]
    queries = queries.view(num_rows, num_kv_heads, -1, head_dim)  # [n, G, R, d]
    num_shared = queries.shape[2]
    if sinks is not None:
        sinks = sinks.view(num_kv_heads, num_shared)
    if group.invariant:
        more = max(0, _FEWEST_INVARIANT - num_shared)
        queries = functional.pad(queries, (0, 0, 0, more))
        sinks = None if sinks is None else functional.pad(sinks, (0, more))
    attended = _softmax(queries, keys, values, group.mask, False, scaling, sinks)
    return attended[:, :, :num_shared].reshape(num_rows, num_heads * head_dim)


def attend_chunk(
    layer: int,
    queries: torch.Tensor,
    chunk: PrefillChunk,
    cache: KVCache,
    scaling: float,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Attends consecutive tokens to one context: [n, H, d] -> output [n, H * d]."""
    keys, values = cache.read(layer, chunk.contexts, chunk.span)  # [1, G, C, d]
    num_kv_heads = keys.shape[1]
    num_shared = queries.shape[1] // num_kv_heads
    if sinks is not None:
        sinks = sinks.view(num_kv_heads, num_shared, 1)
    attend_parts(
        queries.unflatten(1, (-1, num_shared)).permute(1, 2, 0, 3),
        keys.transpose(0, 1).expand(-1, num_shared, -1, -1),
        values.transpose(0, 1).expand(-1, num_shared, -1, -1),
        chunk,
        scaling,
        sinks,
        output.view(len(output), num_kv_heads, num_shared, -1).permute(1, 2, 0, 3),
    )


def attend_parts(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: PrefillChunk,
    scaling: float,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """queries [G, R, n, d] over keys and values [G, R, C, d] -> output [G, R, n, d]; sinks [G, R, 1]."""
    for part in chunk.parts:
        output[:, :, part.queries] = _softmax(
            queries[:, :, part.queries],
            keys[:, :, part.keys],
            values[:, :, part.keys],
            part.mask,
            part.mask is None,
            scaling,
            sinks,
        )


def _softmax(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """queries [.., .., Q, d], keys and values [.., .., K, d] -> [.., .., Q, d]; sinks [.., .., Q]."""
    if sinks is None:
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scaling
        )
    if queries.device.type != "cpu":
        return softmax_beside_sinks(queries, keys, values, mask, is_causal, scaling, sinks)
    # The kernel that the call above runs on a CPU. It also returns the logarithm of each sum.
    attended: torch.Tensor
    attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, is_causal, attn_mask=mask, scale=scaling
    )
    # Not a sigmoid, whose last bits depend on the layout of the numbers in memory.
    shares = torch.stack((log_sums, sinks.float().expand_as(log_sums)), dim=-1).softmax(-1)
    return (attended * shares[..., :1]).to(queries.dtype)


def softmax_beside_sinks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attention with sinks by its definition, for devices whose kernels do not return their sums."""
    score_shape = (*queries.shape[:-1], keys.shape[-2])
    if is_causal:
        mask = torch.full(score_shape[-2:], -torch.inf, device=queries.device).triu(1)
    masks = (queries.new_zeros(()) if mask is None else mask).expand(score_shape)
    sinks = sinks.float().expand(score_shape[:-1])[..., None]
    most = max(1, _MOST_SCORES // math.prod(score_shape[1:]))
    output = torch.empty_like(queries)
    for first in range(0, len(queries), most):
        some = slice(first, first + most)
        scores = (queries[some] @ keys[some].transpose(-2, -1)).float() * scaling + masks[some]
        shares = torch.cat((scores, sinks[some]), dim=-1).softmax(-1)[..., :-1]
        output[some] = shares.to(values.dtype) @ values[some]
    return output
