"""The sequence mixers of a block: attention over keys and values, or a Hyena over a recurrent state.

Both have one interface: they map the normed rows of a packed batch to as many rows, which go to the output projection of
the block, and keep what later tokens need in their own kind of cache.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, d head size, n sequences with one token each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from moesaic.compute.linear import Linear
from moesaic.families.model import Attention
from router.attention.packed_batch import PackedBatch
from router.attention.paged import attend
from router.attention.rotary import turn_
from router.cache.kv_cache import KVCache
from router.cache.state_cache import StateRows
from router.decoders.stripedhyena.filters import LongFilter, ShortFilter
from router.phase_clock import Phase, PhaseClock


@dataclass(frozen=True, slots=True, eq=False)
class MixerStep:
    """A micro-batch as mixers see it, prepared once for all layers."""

    batch: PackedBatch
    cache: KVCache
    turns: torch.Tensor  # [T, 1, d / 2], complex: the rotation of each pair at each position
    states: StateRows


class SequenceMixer(Protocol):
    def __call__(self, hidden: torch.Tensor, step: MixerStep) -> torch.Tensor:
        """Normed hidden [T, D] -> [T, D]. Writes the cache."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMixer:
    """A SequenceMixer over the paged cache, with rotary positions."""

    layer: int
    shape: Attention
    projections: Linear  # D -> (H + 2 G) * d: queries, keys, values; rotary pairs side by side
    clock: PhaseClock

    def __call__(self, hidden: torch.Tensor, step: MixerStep) -> torch.Tensor:
        qkv = self.projections(hidden)
        with self.clock.phase(Phase.ATTENTION):
            num_heads, head_dim = self.shape.num_heads, self.shape.head_dim
            heads = qkv.view(len(qkv), -1, head_dim)
            turn_(heads[:, : num_heads + self.shape.num_kv_heads], step.turns)
            step.cache.write(self.layer, step.batch.cache_positions, qkv[:, num_heads * head_dim :])
            queries = heads[:, :num_heads]
            return attend(self.layer, queries, step.batch, step.cache, head_dim**-0.5)


@dataclass(frozen=True, slots=True, eq=False)
class HyenaMixer:
    """A SequenceMixer over recurrent states: x2 * (h (x1 * v)), where the short filter gives x2, x1 and v, and h is the
    long filter."""

    layer: int
    projections: Linear  # D -> 3 D: the channels of x2, of x1, of v
    short: ShortFilter
    long: LongFilter
    clock: PhaseClock

    def __call__(self, hidden: torch.Tensor, step: MixerStep) -> torch.Tensor:
        channels = self.projections(hidden)
        with self.clock.phase(Phase.ATTENTION):
            assert step.cache.states is not None
            inputs, modes = step.cache.states.of(self.layer)
            mixed = torch.empty_like(hidden)
            for run, slot in step.states.runs:
                filtered, inputs[slot] = self.short.run(channels[run], inputs[slot])
                x2, x1, v = filtered.chunk(3, dim=1)
                output, modes[slot] = self.long.run(x1 * v, modes[slot])
                mixed[run] = (output * x2).to(mixed.dtype)
            rows, slots = step.states.rows, step.states.slots
            if len(slots):
                filtered, inputs[slots] = self.short.step(channels[rows], inputs[slots])
                x2, x1, v = filtered.chunk(3, dim=1)
                output, modes[slots] = self.long.step(x1 * v, modes[slots])
                mixed[rows] = (output * x2).to(mixed.dtype)
        return mixed
