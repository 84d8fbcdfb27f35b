"""What the engine knows of a model: it runs micro-batches through all layers and gives logits.

Two decoders stand behind it: `lean_decoder.py`, our own for the families that it knows, and `stock_decoder.py`, the
modules of transformers for all others and as the reference that the first must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from router.attention.packed_batch import PackedBatch
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.dispatch.dispatcher import DispatchStep
from router.gating.gate_stats import GateHealth


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one pass through the layers works on: a batch, the rows of it whose logits are wanted, its experts."""

    batch: PackedBatch
    rows: torch.Tensor  # [N]
    experts: DispatchStep


class RouterModel(Protocol):
    """Attention, gates, norms, embeddings and head of one model; what experts compute comes from elsewhere."""

    # How its batches are to be packed.
    layout: AttentionLayout
    gates: GateHealth

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that live in this process."""
        ...

    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and gives the logits [N, V] of the wanted rows, part by part."""
        ...
