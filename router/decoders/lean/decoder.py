"""Our own decoder: what transformers computes, with as few operations as that takes.

One product gives queries, keys and values; keys and values go to the cache as they come out of it; weights lie as they
are read; positions are looked up, never computed. Several micro-batches pass the layers in turn, so that one is here
while the workers have the other.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, d head size, N rows whose logits are wanted, V
vocabulary, P positions that can be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families.model import Attention, MoeModel
from router.attention.paged import attend
from router.attention.rotary import rotary_turns, turn_
from router.attention.views import Layout
from router.cache.kv_cache import KVCache
from router.decoders.decoder import MicroBatch
from router.decoders.lean.supported import DecoderLayout
from router.decoders.lean.weights import Layer, Reader
from router.decoders.residual_stream import Flight, landed
from router.gating.gate_stats import GateHealth
from router.phase_clock import Phase, PhaseClock


@dataclass(slots=True, kw_only=True)
class _Flight(Flight):
    turns: torch.Tensor  # [T, 1, d / 2], complex: how far each position turns each pair


class LeanDecoder:
    """A RouterModel of the decoder that `DecoderLayout` describes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: MoeModel,
        decoder: DecoderLayout,
        layout: Layout,
        *,
        num_positions: int,
        clock: PhaseClock,
    ) -> None:
        self.layout = layout
        self.gates = GateHealth.of(model)
        self._clock = clock
        self._norm_eps = decoder.norm_eps
        # The heads of all layers are alike; what each of them sees is the batch's own matter.
        mixer = model.mixers[0]
        assert isinstance(mixer, Attention)
        self._attention = mixer
        self._scaling = mixer.head_dim**-0.5
        reader = Reader(checkpoint, model, layout)
        self._layers = tuple(reader.layer(index) for index in range(model.num_layers))
        self._embedding, self._norm, self._head = reader.ends()
        self._turns = rotary_turns(num_positions, mixer.head_dim, decoder.rope_theta).to(layout.device)
        self.weight_bytes = reader.num_bytes + self._turns.nbytes

    @torch.inference_mode()
    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and gives the logits [N, V] of the wanted rows, part by part."""
        self.gates.begin_step()
        flights = [self._start(part) for part in parts]
        for index, layer in enumerate(self._layers):
            for flight in flights:
                flight.land()
                self._run(index, layer, flight, cache)
        return self._head(self._normed(landed(flights), self._norm))

    def _start(self, part: MicroBatch) -> _Flight:
        hidden = functional.embedding(part.batch.token_ids[0], self._embedding)
        return _Flight(part=part, hidden=hidden, turns=self._turns[part.batch.positions[0]])

    def _run(self, index: int, layer: Layer, flight: _Flight, cache: KVCache) -> None:
        """A layer up to its experts, which are asked and not waited for."""
        attended = self._attend(index, layer, flight, cache)
        if index == len(self._layers) - 1:
            attended = flight.keep_wanted(attended)
            if not len(attended):
                return
        hidden = flight.hidden
        hidden += layer.output(attended)
        normed = self._normed(hidden, layer.experts_norm)
        if layer.gate is not None:
            with self._clock.phase(Phase.GATE):
                assignment = layer.gate(normed)
                if self.gates.looks and layer.gate.logits is not None:
                    self.gates.look(index, layer.gate.logits(normed))
            flight.call = flight.part.experts.send(
                index, normed, assignment.slots, assignment.weights, tokens=flight.tokens
            )
        if layer.mlp is not None:
            flight.beside = layer.mlp(normed)

    def _attend(self, index: int, layer: Layer, flight: _Flight, cache: KVCache) -> torch.Tensor:
        """[T, D] -> [T, H * d]; turns queries and keys where they are."""
        num_heads, head_dim = self._attention.num_heads, self._attention.head_dim
        normed = self._normed(flight.hidden, layer.attention_norm)
        qkv = layer.projections(normed, num_heads, head_dim, self._norm_eps)
        with self._clock.phase(Phase.ATTENTION):
            batch = flight.part.batch
            num_turned = num_heads + self._attention.num_kv_heads
            heads = qkv.view(len(qkv), -1, head_dim)
            turn_(heads[:, :num_turned], flight.turns)
            cache.write(index, batch.cache_positions, qkv[:, num_heads * head_dim :])
            return attend(index, heads[:, :num_heads], batch, cache, self._scaling)

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._norm_eps)
