"""How the gates are doing, layer by layer: how large their logits grow, and what full slots have cost.

The first is the z-loss that routers are trained with: the mean over tokens of the squared logarithm of the sum of the
exponentials of their logits. It is looked at in one step of many, so that nobody waits for it.

Shapes: T tokens, E slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from moesaic.families.model import MoeModel

# A look costs a few operations a layer.
STEPS_PER_LOOK = 64


@dataclass(frozen=True, slots=True)
class GateReading:
    """Of one gate. `z_loss`: of the last step that was looked at; None before the first. Assignments are counted where
    slots can be full."""

    layer: int
    z_loss: float | None
    assignments: int
    dropped: int


@dataclass(slots=True)
class _Gate:
    z_loss: torch.Tensor | None = None
    assignments: int = 0
    dropped: int = 0


@dataclass(slots=True)
class GateHealth:
    """Written by the engine's thread alone; read by anyone."""

    gates: Mapping[int, _Gate]
    # Whether this step is looked at.
    looks: bool = False
    _step: int = field(default=0, repr=False)

    @classmethod
    def of(cls, model: MoeModel) -> GateHealth:
        """Of all gates of a model."""
        gated = (layer for layer, experts in model.experts.items() if experts.gate is not None)
        return cls({layer: _Gate() for layer in sorted(gated)})

    def begin_step(self) -> None:
        self.looks = self._step % STEPS_PER_LOOK == 0
        self._step += 1

    def look(self, layer: int, logits: torch.Tensor) -> None:
        """Takes the z-loss of logits [T, E], in a step that is looked at."""
        if len(logits):
            self.gates[layer].z_loss = z_loss(logits)

    def snapshot(self) -> tuple[GateReading, ...]:
        """Of every gate, as it is now."""
        return tuple(
            GateReading(
                layer,
                None if gate.z_loss is None else float(gate.z_loss),
                gate.assignments,
                gate.dropped,
            )
            for layer, gate in self.gates.items()
        )

    def watch(self, layer: int, gate: nn.Module) -> None:
        """Looks at what a gate of transformers, rows [E, D], makes of its inputs, whatever it gives out."""

        def look(gate: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if self.looks:
                weight, bias = gate.get_parameter("weight"), getattr(gate, "bias", None)
                rows = inputs[0].reshape(-1, weight.shape[1]).float()
                bias = None if bias is None else bias.float()
                self.look(layer, functional.linear(rows, weight.float(), bias))

        gate.register_forward_pre_hook(look)

    def count(self, layer: int, num_assignments: int, num_dropped: int) -> None:
        gate = self.gates[layer]
        gate.assignments += num_assignments
        gate.dropped += num_dropped


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Of logits [T, E], as a scalar on their device."""
    return logits.float().logsumexp(-1).square().mean()
