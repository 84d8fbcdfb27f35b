"""Keys and values in blocks: one tensor per layer, addressed by the block tables of sequences.

Shapes: S cache positions (blocks x block_tokens), G key/value heads, d head size, T tokens of a batch.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moesaic.families.model import (
    Attention,
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
    Hyena,
    LatentAttention,
    Mixer,
)
from router.cache.state_cache import StateCache


@dataclass(frozen=True, slots=True)
class Contexts:
    """Where the keys and values of `count` contexts lie, in `num_blocks` blocks each."""

    count: int
    num_blocks: int
    # The blocks of all contexts, [count * num_blocks]; or the first of a single one's, which are consecutive.
    blocks: torch.Tensor | int


@dataclass(frozen=True, slots=True)
class _LayerCache:
    """Three views of the memory of one layer. A part is keys, values, or one vector that is both."""

    rows: torch.Tensor  # [S, parts * G * d]
    blocks: torch.Tensor  # [blocks, block_tokens * parts * G * d]
    heads: torch.Tensor  # [parts, 1, G, S, d]
    token_shape: tuple[int, int, int]  # parts, G, d


class KVCache:
    """For each layer, what its mixer keeps of every position: keys and values side by side for attention, one
    vector that serves as both for latent attention, nothing for a layer with a recurrent state."""

    def __init__(
        self,
        mixers: Sequence[Mixer],
        *,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        states: StateCache | None = None,
    ) -> None:
        # The states of layers that have a recurrent state in place of keys and values.
        self.states = states
        self._block_tokens = block_tokens
        self._layers = {
            layer: _layer_cache(shape, num_blocks, block_tokens, dtype, device)
            for layer, mixer in enumerate(mixers)
            if (shape := _token_shape(mixer)) is not None
        }
        self._gathered = torch.empty(0, dtype=dtype, device=device)

    def write(self, layer: int, positions: torch.Tensor, rows: torch.Tensor) -> None:
        """Stores rows [T, parts * G * d], keys before values, at cache positions [T]."""
        self._layers[layer].rows.index_copy_(0, positions, rows)

    def read(self, layer: int, contexts: Contexts, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of n contexts, [n, G, L, d] each, at the positions in `span`.

        Valid until the next read. For latent attention both are the same [n, 1, L, d].
        """
        cached = self._layers[layer]
        if isinstance(contexts.blocks, int):
            first = contexts.blocks * self._block_tokens
            parts = cached.heads[..., first + span.start : first + span.stop, :].unbind()
        else:
            copied = self._copy(cached.blocks, contexts.blocks)
            shape = (contexts.count, contexts.num_blocks * self._block_tokens, *cached.token_shape)
            parts = copied.view(shape).permute(2, 0, 3, 1, 4)[..., span, :].unbind()
        return parts[0], parts[-1]

    def _copy(self, blocks: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """A copy of these blocks one after another, in memory that every layer and step reuses."""
        num_items = len(wanted) * blocks.shape[1]
        if self._gathered.numel() < num_items:
            self._gathered = blocks.new_empty(num_items)
        copied = self._gathered[:num_items].view(len(wanted), -1)
        return torch.index_select(blocks, 0, wanted, out=copied)

    @staticmethod
    def token_bytes(mixers: Iterable[Mixer], dtype: torch.dtype) -> int:
        """The bytes that one token takes in all layers together."""
        shapes = (_token_shape(mixer) for mixer in mixers)
        return sum(math.prod(shape) for shape in shapes if shape is not None) * dtype.itemsize


def _token_shape(mixer: Mixer) -> tuple[int, int, int] | None:
    """What a layer keeps of a token: parts, heads, size of a head. None for a layer that keeps nothing."""
    match mixer:
        case Attention():
            return 2, mixer.num_kv_heads, mixer.head_dim
        case LatentAttention():
            return 1, 1, mixer.latent_dim + mixer.rotary_dim
        case DecoderAttention() | CrossAttention():
            return 2, mixer.num_heads, mixer.head_dim
        case Hyena() | EncoderAttention():
            return None


def _layer_cache(
    token_shape: tuple[int, int, int],
    num_blocks: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _LayerCache:
    tensor = _zeros((num_blocks * block_tokens, *token_shape), dtype, device)
    return _LayerCache(
        tensor.flatten(1), tensor.view(num_blocks, -1), tensor.permute(1, 2, 0, 3)[:, None], token_shape
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: masked values are multiplied and must be finite. On a CPU they take memory when written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)
