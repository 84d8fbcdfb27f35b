"""StripedHyena: the one decoder that is not in transformers, behind the same seams as all others.

Its blocks differ in what mixes the tokens of a sequence (see sequence_mixer.py) and in nothing else. Several
micro-batches pass the blocks in turn, so that one is here while the workers have the other; of a sequence that is cut
in two, the first part passes every block before the second, which goes on from the keys, values and states that it left.

Shapes: T tokens, D hidden size, d head size, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families.config import Config
from moesaic.families.model import MoeModel
from moesaic.families.stripedhyena import read_arithmetic
from router.attention.rotary import rotary_turns
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.cache.state_cache import StateRows
from router.decoders.decoder import MicroBatch
from router.decoders.residual_stream import Flight, landed
from router.decoders.stripedhyena.mixers import MixerStep
from router.decoders.stripedhyena.weights import Block, Reader
from router.gating.gate import everyone
from router.gating.gate_stats import GateHealth
from router.phase_clock import PhaseClock


@dataclass(slots=True, kw_only=True)
class _Flight(Flight):
    step: MixerStep


class StripedHyena:
    """A RouterModel of a StripedHyena checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: MoeModel,
        layout: AttentionLayout,
        *,
        num_positions: int,
        clock: PhaseClock,
    ) -> None:
        self.layout = layout
        self.gates = GateHealth.of(model)
        self._arithmetic = read_arithmetic(Config(checkpoint.config))
        reader = Reader(checkpoint, model, self._arithmetic, layout, clock)
        self._blocks = tuple(reader.block(layer) for layer in range(model.num_layers))
        self._embedding, self._norm, self._head = reader.ends()
        head_dim = model.hidden_size // model.mixers[0].num_heads
        base, scaling = self._arithmetic.rotary_base, self._arithmetic.rotary_scaling
        self._turns = rotary_turns(num_positions, head_dim, base, scaling=scaling).to(layout.device)
        self.weight_bytes = reader.num_bytes + self._turns.nbytes

    @torch.inference_mode()
    def forward(self, parts: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and gives the logits [N, V] of the wanted rows, part by part."""
        flights = [self._start(part, cache) for part in parts]
        for layer, block in enumerate(self._blocks):
            for flight in flights:
                flight.land()
                self._run(layer, block, flight)
        return self._head(self._normed(landed(flights), self._norm))

    def _start(self, part: MicroBatch, cache: KVCache) -> _Flight:
        batch = part.batch
        step = MixerStep(
            batch=batch,
            cache=cache,
            turns=self._turns[batch.positions[0]],
            states=StateRows.of(batch.chunks, batch.first_rows, self.layout.device),
        )
        return _Flight(part=part, hidden=functional.embedding(batch.token_ids[0], self._embedding), step=step)

    def _run(self, layer: int, block: Block, flight: _Flight) -> None:
        """A block up to its MLP, which workers are asked for and which is not waited for."""
        mixed = block.mixer(self._normed(flight.hidden, block.pre_norm), flight.step)
        if layer == len(self._blocks) - 1:
            mixed = flight.keep_wanted(mixed)
            if not len(mixed):
                return
        flight.hidden += block.output(mixed)
        normed = self._normed(flight.hidden, block.post_norm)
        if block.mlp is not None:
            flight.beside = block.mlp(normed)
            return
        assignment = everyone(normed)
        flight.call = flight.part.experts.send(
            layer, normed, assignment.slots, assignment.weights, tokens=flight.tokens
        )

    def _normed(self, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rms_norm(
            hidden, scale, self._arithmetic.norm_eps, inside_root=self._arithmetic.eps_inside_root
        )


def rms_norm(hidden: torch.Tensor, scale: torch.Tensor, eps: float, *, inside_root: bool) -> torch.Tensor:
    """hidden [T, D] over the root of the mean of its squares. `eps` goes to that mean, or to the root itself."""
    if inside_root:
        return functional.rms_norm(hidden, scale.shape, scale, eps)
    rows = hidden.float()
    root = rows.square().mean(dim=1, keepdim=True).sqrt_()
    return (rows / root.add_(eps)).to(hidden.dtype) * scale
