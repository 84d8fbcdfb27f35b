"""The model as the engine sees it: it runs micro-batches through all layers and returns logits.

Four decoders implement it: `lean`, our own for the families that it supports; `hf`, the modules of transformers, for all
others and as the reference that `lean` must equal; `encoder_decoder`; and `stripedhyena`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from router.attention.packed_batch import PackedBatch
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.decoders.capture import CapturedRows
from router.dispatch.dispatcher import DispatchStep
from router.gating.gate import Gate
from router.gating.gate_stats import GateStats
from router.gating.model_view import ViewRows


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one pass through the layers: a batch, its rows whose logits are wanted, and its experts."""

    batch: PackedBatch
    rows: torch.Tensor  # [N]
    experts: DispatchStep
    # How its rows see the gates, run by run; without any, all see those of the model folder.
    views: tuple[ViewRows, ...] = ()
    # The rows whose hidden states are read out. All of them are among those whose logits are wanted.
    captures: tuple[CapturedRows, ...] = ()


class RouterModel(Protocol):
    """Attention, gates, norms, embeddings and head of one model. Its experts are computed by workers."""

    # The form in which its batches are packed.
    layout: AttentionLayout
    gate_stats: GateStats

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights that this process holds."""
        ...

    @property
    def gates(self) -> Mapping[int, Gate]:
        """By layer, the gates whose input can be captured. Families with gates of their own have none."""
        ...

    def forward(self, micro_batches: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and returns the logits [N, V] of the wanted rows of each micro-batch in turn."""
        ...
