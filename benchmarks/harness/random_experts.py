"""Experts made of random numbers where they are computed, for models that are too large to be written to a disk.

The numbers follow from layer, slot, device and dtype alone: every process that asks for an expert gets the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS = 1 << 16


def fill_expert(gate_up: Tensor, down: Tensor, layer: int, slot: int) -> None:
    """gate_up [2F, D] and down [D, F], both contiguous: fan-in scaled, in place."""
    generator = torch.Generator(gate_up.device).manual_seed(layer * _SLOTS + slot + 1)
    for weight in (gate_up, down):
        weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
