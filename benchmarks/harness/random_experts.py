"""Experts made of random numbers on the device that computes them, for models too large for a disk.

The numbers depend on layer, slot, device and dtype alone, so every process makes the same expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS = 1 << 16


def fill_expert(gate_up: Tensor, down: Tensor, layer: int, slot: int) -> None:
    """Fills gate_up [2F, D] and down [D, F], both contiguous, with fan-in scaled numbers in place."""
    generator = torch.Generator(gate_up.device).manual_seed(layer * _SLOTS + slot + 1)
    for weight in (gate_up, down):
        weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
