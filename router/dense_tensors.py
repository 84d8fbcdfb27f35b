"""Reading the tensors of a checkpoint that hold no expert weights, each once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from moesaic.checkpoint import Checkpoint
from moesaic.families import MoeModel


def dense_names(checkpoint: Checkpoint, shape: MoeModel) -> frozenset[str]:
    """All but the experts' tensors. Rotary frequencies, which old checkpoints carry, are computed, never read."""
    names = checkpoint.tensors.keys() - shape.expert_tensors
    return frozenset(name for name in names if not name.endswith("rotary_emb.inv_freq"))


def read_dense(
    checkpoint: Checkpoint, names: frozenset[str], *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors, file by file, one at a time."""
    by_file: dict[Path, list[str]] = {}
    for name in sorted(names):
        by_file.setdefault(checkpoint.tensors[name].file, []).append(name)
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as shard:
            for name in wanted:
                # A copy: without it the tensor is a view of the mapped file.
                yield name, shard.get_tensor(name).to(device, dtype, copy=True)
