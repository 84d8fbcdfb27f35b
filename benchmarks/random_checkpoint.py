"""Writes a random Mixtral of any size as a Hugging Face folder, one shard a layer, in bounded memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Mixtral; the default one has 791 M parameters, most of them in experts."""

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
        """The sizes in a Mixtral's config.json, such as `config` returns."""
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
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for name, dense, experts in files(shape):
        tensors = {key: random_tensor(size, generator) for key, size in (dense | experts).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    return describe(folder, shape, weight_map, {"total_size": total_bytes})


def describe(
    folder: Path, shape: Shape, weight_map: Mapping[str, str], metadata: Mapping[str, object]
) -> Path:
    """Writes the config and the index."""
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def files(shape: Shape) -> Iterator[tuple[str, dict[str, Size], dict[str, Size]]]:
    """Each file's name, and the sizes of its dense and expert tensors; the first one holds both ends."""
    for part in range(shape.layers + 1):
        name = f"model-{part + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        yield (name, *(_layer(shape, part - 1) if part else (_ends(shape), {})))


def random_tensor(size: Size, generator: torch.Generator) -> torch.Tensor:
    """Fan-in scaled numbers; vectors are norms, and all ones."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) / math.sqrt(size[1])).to(torch.bfloat16)


def _ends(shape: Shape) -> dict[str, Size]:
    table = (shape.vocabulary, shape.hidden)
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": (shape.hidden,),
    }


def _layer(shape: Shape, layer: int) -> tuple[dict[str, Size], dict[str, Size]]:
    hidden, inner, kv_width = shape.hidden, shape.inner, shape.hidden // shape.heads * shape.kv_heads
    dense: dict[str, Size] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "block_sparse_moe.gate": (shape.experts, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    weights: dict[str, Size] = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    experts = {
        f"block_sparse_moe.experts.{slot}.{name}": size
        for slot in range(shape.experts)
        for name, size in weights.items()
    }
    prefix = f"model.layers.{layer}."
    return _full_names(prefix, dense), _full_names(prefix, experts)


def _full_names(prefix: str, sizes: Mapping[str, Size]) -> dict[str, Size]:
    return {f"{prefix}{name}.weight": size for name, size in sizes.items()}
