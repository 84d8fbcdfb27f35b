"""What a description says of a checkpoint, read word by word: every tensor of the router, every weight of every expert.

Slow and plain; the readers of router and worker must come to the same bits.
"""

# Shapes: H heads, d head size, E slots.

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import MoeModel
from moesaic.families.model import DenseTensor, WeightPattern


def read_described(checkpoint: Checkpoint, model: MoeModel) -> dict[str, torch.Tensor]:
    """Dense tensors under their parameter's name, weights of experts as `LAYER.SLOT.WEIGHT`. Only plain encodings."""
    files = {entry.file for entry in checkpoint.tensors.values()}
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    read = {name: _dense(stored, tensor) for name, tensor in model.dense.items()}
    for layer, slot in ((address.layer, address.slot) for address in model.addresses):
        for weight, pattern in model.experts[layer].layout.items():
            read[f"{layer}.{slot}.{weight}"] = _expert(stored[pattern.name(layer, slot)], pattern, slot)
    return read


def _dense(stored: Mapping[str, torch.Tensor], described: DenseTensor) -> torch.Tensor:
    tensor = stored[described.source]
    if described.rows is not None:
        tensor = tensor[slice(*described.rows)]
    if described.rotary_heads is not None:
        # Row 2i of a head becomes row i, row 2i + 1 row d/2 + i.
        heads = tensor.chunk(described.rotary_heads)
        tensor = torch.cat([torch.cat((head[0::2], head[1::2])) for head in heads])
    assert tensor.shape == described.shape
    return tensor


def _expert(tensor: torch.Tensor, pattern: WeightPattern, slot: int) -> torch.Tensor:
    if pattern.stacked:
        tensor = tensor[slot]
    if pattern.transposed:
        tensor = tensor.t()
    part, num_parts = pattern.part
    return tensor[part::num_parts] if pattern.interleaved else tensor.chunk(num_parts)[part]
