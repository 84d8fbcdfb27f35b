"""A random Mixtral whose experts take no space: the files have holes where their headers place them.

All that a router reads is there, in bfloat16. An expert is read as zeros; random_experts.py makes its
weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from random_checkpoint import Shape, Size, describe, files, random_tensor

_ITEM_BYTES = 2
_LENGTH_BYTES = 8


def write_sparse_checkpoint(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Fills `folder` with a config, one file a layer and one for both ends, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for name, dense, experts in files(shape):
        _write(folder / name, dense, experts, generator)
        weight_map |= dict.fromkeys((*dense, *experts), name)
    return describe(folder, shape, weight_map, {})


def _write(
    file: Path, dense: Mapping[str, Size], holes: Mapping[str, Size], generator: torch.Generator
) -> None:
    """Writes the dense tensors; the holes lie behind them."""
    sizes = {**dense, **holes}
    header = json.dumps(dict(_entries(sizes))).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        for size in dense.values():
            out.write(random_tensor(size, generator).view(torch.uint8).numpy().data)
        out.truncate(_LENGTH_BYTES + len(header) + sum(map(_num_bytes, sizes.values())))


def _entries(sizes: Mapping[str, Size]) -> Iterator[tuple[str, dict[str, object]]]:
    start = 0
    for name, size in sizes.items():
        end = start + _num_bytes(size)
        yield name, {"dtype": "BF16", "shape": size, "data_offsets": (start, end)}
        start = end


def _num_bytes(size: Size) -> int:
    return _ITEM_BYTES * math.prod(size)
