"""Our own decoder: it computes what transformers computes, with as few operations as possible.

One product gives queries, keys and values; keys and values are cached as that product leaves them; weights are stored in
the layout in which they are read; rotary positions are looked up, never computed. Several micro-batches pass the layers
in turn, so that the router computes one while the workers compute the other.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, d head size, N rows whose logits are wanted, V
vocabulary, P positions that can be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families.model import Attention
from router.attention.paged import attend
from router.attention.rotary import rotary_turns, turn_
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.decoders.capture import capture_gate_input, capture_residual
from router.decoders.decoder import MicroBatch
from router.decoders.lean.supported import SupportedModel
from router.decoders.lean.weights import DecoderLayer, LayerReader
from router.decoders.residual_stream import ResidualStream, final_hidden
from router.gating.gate import Assignment, Gate, assign_all
from router.gating.gate_stats import GateStats
from router.phase_clock import Phase, PhaseClock


@dataclass(slots=True, kw_only=True)
class _Stream(ResidualStream):
    turns: torch.Tensor  # [T, 1, d / 2], complex: the rotation of each pair at each position


class LeanDecoder:
    """A RouterModel of any model that `supported.py` lists."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        supported: SupportedModel,
        layout: AttentionLayout,
        *,
        num_positions: int,
        clock: PhaseClock,
    ) -> None:
        model = supported.model
        self.layout = layout
        self.gate_stats = GateStats.of(model)
        self._clock = clock
        self._norm_eps = supported.norm_eps
        # The heads of all layers have the same sizes; the windows of each are part of the batch.
        mixer = model.mixers[0]
        assert isinstance(mixer, Attention)
        self._attention = mixer
        self._scaling = mixer.head_dim**-0.5
        self._expert_layers = frozenset(model.experts)
        reader = LayerReader(checkpoint, model, layout)
        self._layers = tuple(reader.layer(index) for index in range(model.num_layers))
        self._embedding, self._norm, self._head = reader.ends()
        self._turns = rotary_turns(num_positions, mixer.head_dim, supported.rope_theta).to(layout.device)
        self.weight_bytes = reader.num_bytes + self._turns.nbytes

    @property
    def gates(self) -> dict[int, Gate]:
        return {index: layer.gate for index, layer in enumerate(self._layers) if layer.gate is not None}

    @torch.inference_mode()
    def forward(self, micro_batches: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and returns the logits [N, V] of the wanted rows of each micro-batch in turn."""
        self.gate_stats.begin_step()
        streams = [self._start(micro_batch) for micro_batch in micro_batches]
        for index, layer in enumerate(self._layers):
            for stream in streams:
                stream.add_layer_output()
                self._run(index, layer, stream, cache)
        return self._head(self._normed(final_hidden(streams), self._norm))

    def _start(self, micro_batch: MicroBatch) -> _Stream:
        batch = micro_batch.batch
        hidden = functional.embedding(batch.token_ids[0], self._embedding)
        return _Stream(micro_batch=micro_batch, hidden=hidden, turns=self._turns[batch.positions[0]])

    def _run(self, index: int, layer: DecoderLayer, stream: _Stream, cache: KVCache) -> None:
        """Computes a layer up to the call of its experts, without waiting for their answer."""
        if layer.gate is not None:
            capture_residual(stream.captures, index, stream.hidden)
        attended = self._attend(index, layer, stream, cache)
        if index == len(self._layers) - 1:
            attended = stream.keep_wanted(attended)
            if not len(attended):
                return
        hidden = stream.hidden
        hidden += layer.output(attended)
        normed = self._normed(hidden, layer.experts_norm)
        if index in self._expert_layers:
            with self._clock.phase(Phase.GATE):
                assignment = (
                    assign_all(normed)
                    if layer.gate is None
                    else self._assign(index, layer.gate, normed, stream)
                )
            stream.call = stream.micro_batch.experts.send(
                index, normed, assignment.slots, assignment.weights, tokens=stream.tokens
            )
        if layer.mlp is not None:
            stream.local_output = layer.mlp(normed)

    def _assign(self, index: int, gate: Gate, normed: torch.Tensor, stream: _Stream) -> Assignment:
        if self.gate_stats.sampling:
            self.gate_stats.record_logits(index, gate.logits(normed))
        capture_gate_input(stream.captures, index, normed)
        return gate.assign_views(index, normed, stream.views)

    def _attend(self, index: int, layer: DecoderLayer, stream: _Stream, cache: KVCache) -> torch.Tensor:
        """[T, D] -> [T, H * d]. Rotates queries and keys in place."""
        num_heads, head_dim = self._attention.num_heads, self._attention.head_dim
        normed = self._normed(stream.hidden, layer.attention_norm)
        qkv = layer.projections(normed, num_heads, head_dim, self._norm_eps)
        with self._clock.phase(Phase.ATTENTION):
            batch = stream.micro_batch.batch
            num_turned = num_heads + self._attention.num_kv_heads
            heads = qkv.view(len(qkv), -1, head_dim)
            turn_(heads[:, :num_turned], stream.turns)
            cache.write(index, batch.cache_positions, qkv[:, num_heads * head_dim :])
            return attend(index, heads[:, :num_heads], batch, cache, self._scaling)

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._norm_eps)
