"""StripedHyena: the only decoder that transformers does not have, behind the same seams as all others.

Its blocks differ only in their sequence mixer (see mixers.py). Several micro-batches pass the blocks in turn, so that the
router computes one while the workers compute the other. Where two micro-batches hold consecutive parts of one sequence,
the first passes every block before the second, which continues from the keys, values and states that it left.

Shapes: T tokens, D hidden size, d head size, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families.stripedhyena import StripedHyenaModel
from router.attention.rotary import rotary_turns
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.cache.state_cache import StateRows
from router.decoders.decoder import MicroBatch
from router.decoders.residual_stream import ResidualStream, final_hidden
from router.decoders.stripedhyena.mixers import MixerStep
from router.decoders.stripedhyena.weights import Block, BlockReader
from router.gating.gate import Gate, assign_all
from router.gating.gate_stats import GateStats
from router.phase_clock import PhaseClock


@dataclass(slots=True, kw_only=True)
class _Stream(ResidualStream):
    step: MixerStep


class StripedHyena:
    """A RouterModel of a StripedHyena checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: StripedHyenaModel,
        layout: AttentionLayout,
        *,
        num_positions: int,
        clock: PhaseClock,
    ) -> None:
        self.layout = layout
        self.gate_stats = GateStats.of(model)
        self._arithmetic = model.arithmetic
        reader = BlockReader(checkpoint, model, layout, clock)
        self._blocks = tuple(reader.block(layer) for layer in range(model.num_layers))
        self._embedding, self._norm, self._head = reader.ends()
        head_dim = model.hidden_size // model.mixers[0].num_heads
        base, scaling = self._arithmetic.rotary_base, self._arithmetic.rotary_scaling
        self._turns = rotary_turns(num_positions, head_dim, base, scaling=scaling).to(layout.device)
        self.weight_bytes = reader.num_bytes + self._turns.nbytes

    @property
    def gates(self) -> dict[int, Gate]:
        """None whose input can be captured."""
        return {}

    @torch.inference_mode()
    def forward(self, micro_batches: Sequence[MicroBatch], cache: KVCache) -> torch.Tensor:
        """Runs a step, writes the cache, and returns the logits [N, V] of the wanted rows of each micro-batch in turn."""
        streams = [self._start(micro_batch, cache) for micro_batch in micro_batches]
        for layer, block in enumerate(self._blocks):
            for stream in streams:
                stream.add_layer_output()
                self._run(layer, block, stream)
        return self._head(self._normed(final_hidden(streams), self._norm))

    def _start(self, micro_batch: MicroBatch, cache: KVCache) -> _Stream:
        batch = micro_batch.batch
        step = MixerStep(
            batch=batch,
            cache=cache,
            turns=self._turns[batch.positions[0]],
            states=StateRows.of(batch.chunks, batch.first_rows, self.layout.device),
        )
        hidden = functional.embedding(batch.token_ids[0], self._embedding)
        return _Stream(micro_batch=micro_batch, hidden=hidden, step=step)

    def _run(self, layer: int, block: Block, stream: _Stream) -> None:
        """Computes a block up to the call of its expert, without waiting for the answer."""
        mixed = block.mixer(self._normed(stream.hidden, block.pre_norm), stream.step)
        if layer == len(self._blocks) - 1:
            mixed = stream.keep_wanted(mixed)
            if not len(mixed):
                return
        stream.hidden += block.output(mixed)
        normed = self._normed(stream.hidden, block.post_norm)
        if block.mlp is not None:
            stream.local_output = block.mlp(normed)
            return
        assignment = assign_all(normed)
        stream.call = stream.micro_batch.experts.send(
            layer, normed, assignment.slots, assignment.weights, tokens=stream.tokens
        )

    def _normed(self, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rms_norm(
            hidden, scale, self._arithmetic.norm_eps, inside_root=self._arithmetic.eps_inside_root
        )


def rms_norm(hidden: torch.Tensor, scale: torch.Tensor, eps: float, *, inside_root: bool) -> torch.Tensor:
    """Divides hidden [T, D] by the root of the mean of its squares. `eps` is added to that mean, or to the root itself."""
    if inside_root:
        return functional.rms_norm(hidden, scale.shape, scale, eps)
    rows = hidden.float()
    root = rows.square().mean(dim=1, keepdim=True).sqrt_()
    return (rows / root.add_(eps)).to(hidden.dtype) * scale
