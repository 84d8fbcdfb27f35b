"""Statistics of the gates, layer by layer: how large their logits grow, and how many assignments full slots dropped.

The former is the z-loss with which gates are trained: the mean over tokens of the squared logarithm of the sum of the
exponentials of their logits. It is measured in one step of many, so that serving is not slowed down.

Shapes: T tokens, D hidden size, E slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from moesaic.families.model import MoeModel

# Only every such step is sampled: the z-loss costs a few operations per layer.
STEPS_PER_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class LayerGateStats:
    """The statistics of one gate. `z_loss` is that of the last sampled step, None before the first. Assignments are
    counted only where slots can be full."""

    layer: int
    z_loss: float | None
    assignments: int
    dropped: int


@dataclass(slots=True)
class _Counters:
    z_loss: torch.Tensor | None = None
    assignments: int = 0
    dropped: int = 0


@dataclass(slots=True)
class GateStats:
    """The statistics of all gates of a model. Only the engine's thread writes them; any thread may read them."""

    _layers: Mapping[int, _Counters]
    # Whether the z-loss is measured in this step.
    sampling: bool = False
    _step: int = field(default=0, repr=False)

    @classmethod
    def of(cls, model: MoeModel) -> GateStats:
        """Empty statistics for all gates of a model."""
        gated = (layer for layer, experts in model.experts.items() if experts.gate is not None)
        return cls({layer: _Counters() for layer in sorted(gated)})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a gate."""
        return tuple(self._layers)

    def begin_step(self) -> None:
        self.sampling = self._step % STEPS_PER_SAMPLE == 0
        self._step += 1

    def record_logits(self, layer: int, logits: torch.Tensor) -> None:
        """Measures the z-loss of logits [T, E]; called in a sampled step."""
        if len(logits):
            self._layers[layer].z_loss = z_loss(logits)

    def record_dropped(self, layer: int, num_assignments: int, num_dropped: int) -> None:
        counters = self._layers[layer]
        counters.assignments += num_assignments
        counters.dropped += num_dropped

    def observe_module(self, layer: int, gate: nn.Module) -> None:
        """Records the logits of a gate module of transformers, rows [E, D], from its inputs, whatever its outputs are."""

        def record(gate: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if self.sampling:
                weight, bias = gate.get_parameter("weight"), getattr(gate, "bias", None)
                rows = inputs[0].reshape(-1, weight.shape[1]).float()
                bias = None if bias is None else bias.float()
                self.record_logits(layer, functional.linear(rows, weight.float(), bias))

        gate.register_forward_pre_hook(record)

    def snapshot(self) -> tuple[LayerGateStats, ...]:
        """The current statistics of every gate."""
        return tuple(
            LayerGateStats(
                layer,
                None if counters.z_loss is None else float(counters.z_loss),
                counters.assignments,
                counters.dropped,
            )
            for layer, counters in self._layers.items()
        )


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The z-loss of logits [T, E], as a scalar on their device."""
    return logits.float().logsumexp(-1).square().mean()
