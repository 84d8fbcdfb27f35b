"""Writes a random Mixtral of any size as an ordinary Hugging Face folder, one shard a layer, in bounded memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True)
class Shape:
    """A Mixtral's sizes; the default is 791 M parameters, most of them in experts."""

    hidden: int = 1024
    inner: int = 3584
    layers: int = 8
    experts: int = 8
    experts_per_token: int = 2
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 32_000
    context: int = 4096

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The sizes in a Mixtral's config.json, that of `config` as well."""
        return cls(
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            experts=config["num_local_experts"],
            experts_per_token=config["num_experts_per_tok"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            vocabulary=config["vocab_size"],
            context=config["max_position_embeddings"],
        )

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }


def write_checkpoint(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Fills `folder` with bfloat16 weights, fan-in scaled, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for index in range(shape.layers + 1):
        tensors = _layer(shape, index - 1, generator) if index else _ends(shape, generator)
        name = f"model-{index + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


def _random(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(torch.bfloat16)


def _ends(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": _random(generator, shape.vocabulary, shape.hidden),
        "lm_head.weight": _random(generator, shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }


def _layer(shape: Shape, index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, kv_width = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "block_sparse_moe.gate": (shape.experts, hidden),
    }
    for slot in range(shape.experts):
        expert = f"block_sparse_moe.experts.{slot}"
        matrices |= {
            f"{expert}.w1": (shape.inner, hidden),
            f"{expert}.w3": (shape.inner, hidden),
            f"{expert}.w2": (hidden, shape.inner),
        }
    layer = {f"{name}.weight": _random(generator, *size) for name, size in matrices.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layer[f"{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
