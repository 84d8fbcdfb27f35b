"""One more expert in every layer of the demo model: its weights, and the checkpoint that holds it.

The base's own tensors are copied file to file and never touched, so that a checkpoint with newcomers differs
from the base by the newcomers alone.

Shapes: E experts of the base, D hidden size, F hidden size of an expert.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A gated MLP and its gate row, for one layer."""

    gate_row: Tensor  # [D]
    w1: Tensor  # [F, D], the gate of the MLP
    w2: Tensor  # [D, F], down
    w3: Tensor  # [F, D], up


def newcomers_of(model: Any) -> list[Newcomer]:
    """The last slot of every layer of a Mixtral of transformers."""
    return [_last_slot(layer.mlp) for layer in model.model.layers]


def _last_slot(block: Any) -> Newcomer:
    w1, w3 = block.experts.gate_up_proj[-1].detach().chunk(2)
    return Newcomer(block.gate.weight[-1].detach(), w1, block.experts.down_proj[-1].detach(), w3)


def with_newcomers(base: dict[str, Tensor], newcomers: list[Newcomer]) -> dict[str, Tensor]:
    """The base's tensors with the newcomers as slot E of every layer, in the base's dtype."""
    tensors = dict(base)
    for layer, newcomer in enumerate(newcomers):
        block = f"model.layers.{layer}.block_sparse_moe"
        gate = base[f"{block}.gate.weight"]  # [E, D]
        tensors[f"{block}.gate.weight"] = torch.cat([gate, newcomer.gate_row[None].to(gate.dtype)])
        for name in ("w1", "w2", "w3"):
            weight = getattr(newcomer, name).to(gate.dtype).contiguous()
            tensors[f"{block}.experts.{len(gate)}.{name}.weight"] = weight
    return tensors


def write_checkpoint(base: Path, newcomers: list[Newcomer], out: Path) -> None:
    """The folder of the base with one more expert per layer; what was in `out` before is overwritten."""
    shutil.copytree(base, out, dirs_exist_ok=True)
    tensors = with_newcomers(load_file(base / "model.safetensors"), newcomers)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["num_local_experts"] += 1
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
