"""DeepSeek's latent attention over a cache of one compressed vector per token. It equals the modules of transformers, but
does not cache the keys and values of every head.

Each head derives its keys U c and values W c linearly from the cached vector c, so there are two ways to attend.
Absorbed: U is applied to the query and W to the sum, and all heads attend to the cached vectors as they are; this suits
tokens that decode. Expanded: keys and values of the whole context are computed first, which pays off once enough queries
share them.

Shapes: T tokens, D hidden size, H heads, n rows that are attended together, C positions of their context, l size of the
compressed vector, r size of the rotary part of a key, k size of the rest of a head's key, v size of its value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moesaic.errors import Unsupported
from moesaic.families.model import LatentAttention
from router.attention.packed_batch import PackedBatch
from router.attention.paged import attend_chunk, attend_group, attend_parts
from router.attention.plan import PrefillChunk
from router.cache.kv_cache import KVCache
from router.decoders.hf.attention import AttentionStep
from router.phase_clock import Phase

# The modules of transformers that compute the same, and whether their rotary pairs lie side by side. None: the config
# decides.
_PAIRS_SIDE_BY_SIDE: dict[str, bool | None] = {
    "AXK1Attention": None,
    "DeepseekV2Attention": True,
    "DeepseekV3Attention": None,
    "Glm4MoeLiteAttention": None,
    "MiniCPM3Attention": False,
    "YoutuAttention": None,
}
_PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_NORMS = ("q_a_layernorm", "kv_a_layernorm")

# The most elements of expanded keys and values that are held at a time, unless a single head has more.
_MOST_EXPANDED = 1 << 24
# The cost of a multiplication in the expanding product, relative to one inside attention. Measured on a CPU.
_PRODUCT_COST = {torch.float32: 1.0, torch.bfloat16: 0.25, torch.float16: 0.25}


class LatentAttentionModule(nn.Module):
    """Replaces the attention module of a decoder layer and takes over its parameters under their names."""

    q_proj: nn.Linear | None  # D -> H * (k + r); None: the next three modules do the same
    q_a_proj: nn.Linear
    q_a_layernorm: nn.Module
    q_b_proj: nn.Linear
    kv_a_proj_with_mqa: nn.Linear  # D -> l + r
    kv_a_layernorm: nn.Module
    kv_b_proj: nn.Linear  # l -> H * (k + v)
    o_proj: nn.Linear  # H * v -> D

    def __init__(self, module: nn.Module, layer: int, mixer: LatentAttention) -> None:
        """Raises Unsupported for a module that might compute something else."""
        super().__init__()
        kind = type(module).__name__
        if kind not in _PAIRS_SIDE_BY_SIDE:
            raise Unsupported(f"model: the latent attention of {kind} is not known here", field="model")
        for name in (*_PROJECTIONS, *_NORMS):
            self.register_module(name, getattr(module, name, None))
        side_by_side = _PAIRS_SIDE_BY_SIDE[kind]
        config: Any = module.config
        self._side_by_side = bool(config.rope_interleave) if side_by_side is None else side_by_side
        self._scaling = float(module.scaling)  # type: ignore[arg-type]
        self._layer = layer
        self._mixer = mixer

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *,
        step: AttentionStep,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, T, D] -> ([1, T, D], None). Position embeddings are complex [1, T, r / 2], or cosine and sine [1, T, r]."""
        mixer, hidden = self._mixer, hidden_states[0]
        turns = _turns(position_embeddings)
        queries, rotary = self._queries(hidden).split([mixer.key_dim, mixer.rotary_dim], dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden).split([mixer.latent_dim, mixer.rotary_dim], dim=-1)
        row = torch.cat((self.kv_a_layernorm(latent), self._turned(key, turns)), dim=-1)
        queries = torch.cat((queries, self._turned(rotary, turns[:, None])), dim=-1)
        with step.clock.phase(Phase.ATTENTION):
            step.cache.write(self._layer, step.batch.cache_positions, row)
            attended = self._attend(queries, step.batch, step.cache)
        output: torch.Tensor = self.o_proj(attended)
        return output[None], None

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, H, k + r]"""
        if self.q_proj is not None:
            queries = self.q_proj(hidden)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        heads: torch.Tensor = queries.view(len(hidden), self._mixer.num_heads, -1)
        return heads

    def _turned(self, rotary: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Rotates the pairs of [.., r] in float32. They come out side by side, as scores do not depend on the order."""
        pairs = rotary.unflatten(-1, (-1, 2) if self._side_by_side else (2, -1)).float()
        if not self._side_by_side:
            pairs = pairs.transpose(-2, -1)
        turned = torch.view_as_complex(pairs.contiguous()) * turns
        return torch.view_as_real(turned).flatten(-2).to(rotary.dtype)

    def _attend(self, queries: torch.Tensor, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
        """[T, H, k + r] -> [T, H * v]"""
        plan, layer = batch.plan(self._layer), self._layer
        output = queries.new_empty(len(queries), self._mixer.num_heads, self._mixer.value_dim)
        for group in plan.decode:
            absorbed = self._absorb(queries[group.rows])
            output[group.rows] = self._release(attend_group(layer, absorbed, group, cache, self._scaling))
        for chunk in plan.prefill:
            rows = queries[chunk.rows]
            if self._expands(len(rows), rows.dtype):
                self._attend_expanded(rows, chunk, cache, output[chunk.rows])
            else:
                absorbed = self._absorb(rows)
                attended = torch.empty_like(absorbed).flatten(1)
                attend_chunk(layer, absorbed, chunk, cache, self._scaling, None, attended)
                output[chunk.rows] = self._release(attended)
        return output.flatten(1)

    def _expands(self, num_queries: int, dtype: torch.dtype) -> bool:
        """Whether expanded heads save this number of queries more multiplications, per position, than expanding costs."""
        mixer = self._mixer
        expanding = mixer.latent_dim * (mixer.key_dim + mixer.value_dim) * _PRODUCT_COST[dtype]
        return 2 * (mixer.latent_dim - mixer.key_dim) * num_queries > expanding

    @property
    def _heads(self) -> torch.Tensor:
        """[H, k + v, l]: the weights that derive keys and values from the compressed vector."""
        return self.kv_b_proj.weight.view(self._mixer.num_heads, -1, self._mixer.latent_dim)

    def _absorb(self, queries: torch.Tensor) -> torch.Tensor:
        """[n, H, k + r] -> [n, H, l + r]: queries of the size of the cached vectors, with the same scores."""
        plain, rotary = queries.split([self._mixer.key_dim, self._mixer.rotary_dim], dim=-1)
        latent = torch.bmm(plain.transpose(0, 1), self._heads[:, : self._mixer.key_dim])
        return torch.cat((latent.transpose(0, 1), rotary), dim=-1)

    def _release(self, attended: torch.Tensor) -> torch.Tensor:
        """Weighted sums of cached vectors [n, H * (l + r)] -> the weighted sums of values that they represent, [n, H, v]."""
        mixer = self._mixer
        latent = attended.view(len(attended), mixer.num_heads, -1)[..., : mixer.latent_dim]
        values = self._heads[:, mixer.key_dim :].transpose(1, 2)
        return torch.bmm(latent.transpose(0, 1), values).transpose(0, 1)

    def _attend_expanded(
        self, queries: torch.Tensor, chunk: PrefillChunk, cache: KVCache, output: torch.Tensor
    ) -> None:
        """[n, H, k + r] -> output [n, H, v], with as many heads at a time as the memory bound allows."""
        mixer = self._mixer
        rows, _ = cache.read(self._layer, chunk.contexts, chunk.span)  # [1, 1, C, l + r]
        latent, rotary = rows[0, 0].split([mixer.latent_dim, mixer.rotary_dim], dim=-1)
        key_size = mixer.key_dim + mixer.rotary_dim
        most = max(1, _MOST_EXPANDED // (len(latent) * 2 * key_size))
        for first in range(0, mixer.num_heads, most):
            heads = slice(first, first + most)
            weight = self._heads[heads]
            expanded = functional.linear(latent, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])
            keys, values = expanded.transpose(0, 1).split([mixer.key_dim, mixer.value_dim], dim=-1)
            keys = torch.cat((keys, rotary.expand(len(keys), -1, -1)), dim=-1)
            # Fused kernels need keys and values of one size.
            values = functional.pad(values, (0, max(0, key_size - mixer.value_dim)))
            attended = values.new_empty(len(values), 1, len(queries), values.shape[-1])
            attend_parts(
                queries[:, heads].transpose(0, 1)[:, None],
                keys[:, None],
                values[:, None],
                chunk,
                self._scaling,
                None,
                attended,
            )
            output[:, heads] = attended[:, 0, :, : mixer.value_dim].transpose(0, 1)


def _turns(position_embeddings: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[T, r / 2] complex64: the rotation and the scaling of each pair at each position."""
    if isinstance(position_embeddings, torch.Tensor):
        return position_embeddings[0]
    cos, sin = (part[0, :, : part.shape[-1] // 2].float() for part in position_embeddings)
    return torch.complex(cos, sin)
