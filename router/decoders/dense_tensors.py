"""Reads the tensors that the router holds, each once and under the name of its parameter.

A file may store them in another form: several joined into one, with rotary rows in another order, as float8 in blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.compute.dequantise import dequantise_fp8_block, fp8_row_scales
from moesaic.families.model import DenseTensor


def read_dense(
    checkpoint: Checkpoint,
    dense: Mapping[str, DenseTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    exact: Collection[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each tensor with its name, one at a time, file by file; those named in `exact` are float32 for any dtype."""
    by_file: dict[Path, list[str]] = {}
    for name in sorted(dense):
        by_file.setdefault(checkpoint.tensors[dense[name].source].file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                stored = dense[name]
                rows = slice(None) if stored.rows is None else slice(*stored.rows)
                tensor = shard.get_slice(stored.source)[rows]
                if stored.scales is not None:
                    scales = fp8_row_scales(_read(checkpoint, stored.scales), rows.start or 0, len(tensor))
                    tensor = dequantise_fp8_block(tensor, scales)
                if stored.rotary_heads is not None:
                    tensor = pairs_half_apart(tensor, stored.rotary_heads)
                # A copy: without it the tensor may be a view of the mapped file.
                yield name, tensor.to(device, torch.float32 if name in exact else dtype, copy=True)


def pairs_half_apart(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorders rows [h * d, ...] of queries or keys whose rotary pairs lie side by side: in each head, the first members
    of all pairs come before the second ones."""
    halves: torch.Tensor = rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halves


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.tensors[name].file, framework="pt") as shard:
        tensor: torch.Tensor = shard.get_tensor(name)
    return tensor
