"""Checkpoints of any size that take no room: all headers are real, and behind them lie holes that read as zeros."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

_ITEM_BYTES = {"BF16": 2, "F32": 4}


def write_sparse(folder: Path, config: Mapping[str, Any], shapes: Shapes, *, dtype: str = "BF16") -> Path:
    """Writes config.json and one model.safetensors with tensors of these shapes; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    end, entries = 0, {}
    for name, shape in shapes.items():
        first, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        os.truncate(file.fileno(), 8 + len(header) + end)
    return folder


def write_sparse_decoder(folder: Path, config: Mapping[str, Any]) -> Path:
    """A Mistral, or with `num_local_experts` a Mixtral, in bfloat16 and in the form of the published ones."""
    family = "mixtral" if "num_local_experts" in config else "mistral"
    full = {"model_type": family, "hidden_act": "silu", **config}
    return write_sparse(folder, full, dict(_decoder_shapes(full)))


def _decoder_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
        if "num_local_experts" not in config:
            yield prefix + "mlp.gate_proj.weight", (inner, hidden)
            yield prefix + "mlp.up_proj.weight", (inner, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, inner)
            continue
        yield prefix + "block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
        for slot in range(config["num_local_experts"]):
            expert = f"{prefix}block_sparse_moe.experts.{slot}."
            yield expert + "w1.weight", (inner, hidden)
            yield expert + "w2.weight", (hidden, inner)
            yield expert + "w3.weight", (inner, hidden)


TINY_MISTRAL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# As published in December 2023: 46.7 billion parameters, 87 GiB.
MIXTRAL_8X7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
