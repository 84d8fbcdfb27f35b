"""A random Mixtral whose experts take no room: their headers promise every byte, the files have holes in their place.

All that a router reads is there, in bfloat16. Who reads an expert reads zeros: see random_experts.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from random_checkpoint import Shape

_ITEM_BYTES = 2
_LENGTH_BYTES = 8

Size = tuple[int, ...]


def write_sparse_checkpoint(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Fills `folder` with a config, one file a layer and one for both ends, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for part in range(shape.layers + 1):
        name = f"model-{part + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        dense = _ends(shape) if part == 0 else _dense(shape, part - 1)
        holes = {} if part == 0 else _experts(shape, part - 1)
        _write(folder / name, dense, holes, generator)
        weight_map |= dict.fromkeys((*dense, *holes), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _ends(shape: Shape) -> dict[str, Size]:
    table = (shape.vocabulary, shape.hidden)
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": (shape.hidden,),
    }


def _dense(shape: Shape, layer: int) -> dict[str, Size]:
    hidden, kv_width = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    sizes: dict[str, Size] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "block_sparse_moe.gate": (shape.experts, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}


def _experts(shape: Shape, layer: int) -> dict[str, Size]:
    sizes = {
        "w1": (shape.inner, shape.hidden),
        "w2": (shape.hidden, shape.inner),
        "w3": (shape.inner, shape.hidden),
    }
    return {
        f"model.layers.{layer}.block_sparse_moe.experts.{slot}.{name}.weight": size
        for slot in range(shape.experts)
        for name, size in sizes.items()
    }


def _write(
    file: Path, dense: Mapping[str, Size], holes: Mapping[str, Size], generator: torch.Generator
) -> None:
    """The holes lie behind everything that is written."""
    sizes = {**dense, **holes}
    header = json.dumps(dict(_entries(sizes))).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        for size in dense.values():
            out.write(_random(size, generator).view(torch.uint8).numpy().data)
        out.truncate(_LENGTH_BYTES + len(header) + sum(map(_num_bytes, sizes.values())))


def _entries(sizes: Mapping[str, Size]) -> Iterator[tuple[str, dict[str, object]]]:
    start = 0
    for name, size in sizes.items():
        end = start + _num_bytes(size)
        yield name, {"dtype": "BF16", "shape": size, "data_offsets": (start, end)}
        start = end


def _num_bytes(size: Size) -> int:
    return _ITEM_BYTES * math.prod(size)


def _random(size: Size, generator: torch.Generator) -> torch.Tensor:
    """Fan-in scaled; norms are ones."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) * size[1] ** -0.5).to(torch.bfloat16)
