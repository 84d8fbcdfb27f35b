"""Phi in the layout of its first authors, and Phixtral, made from a checkpoint of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_ENDS = {
    "model.embed_tokens": "transformer.embd.wte",
    "model.final_layernorm": "lm_head.ln",
    "lm_head": "lm_head.linear",
}
_BLOCK = {
    "input_layernorm": "ln",
    "self_attn.dense": "mixer.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def old_config(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What the first authors' config says of the same model."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {
        "_name_or_path": "made/here",
        "activation_function": config["hidden_act"],
        "architectures": ["PhiForCausalLM"],
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "flash_attn": False,
        "flash_rotary": False,
        "fused_dense": False,
        "img_processor": None,
        "initializer_range": 0.02,
        "layer_norm_epsilon": config["layer_norm_eps"],
        "model_type": "phi-msft",
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_head_kv": None,
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "resid_pdrop": 0.1,
        "rotary_dim": round(config["rope_parameters"]["partial_rotary_factor"] * head_dim),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": config["vocab_size"],
        **changes,
    }


def old_tensors(tensors: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    old = {}
    for kind in ("weight", "bias"):
        for new_name, old_name in _ENDS.items():
            if f"{new_name}.{kind}" in tensors:
                old[f"{old_name}.{kind}"] = tensors[f"{new_name}.{kind}"]
        for layer in range(num_layers):
            prefix, block = f"model.layers.{layer}.", f"transformer.h.{layer}."
            for new_name, old_name in _BLOCK.items():
                old[f"{block}{old_name}.{kind}"] = tensors[f"{prefix}{new_name}.{kind}"]
            thirds = [tensors[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            old[f"{block}mixer.Wqkv.{kind}"] = torch.cat(thirds)
    return old


def write_old_phi(folder: Path, source: Path, **changes: Any) -> Path:
    """The model of folder `source` in the old layout."""
    config = json.loads((source / "config.json").read_text())
    tensors = old_tensors(load_file(source / "model.safetensors"), config["num_hidden_layers"])
    return write_folder(folder, old_config(config, **changes), tensors)


def write_phixtral(
    folder: Path, source: Path, *, num_slots: int, top_k: int, seed: int, equal_gates: bool = False
) -> Path:
    """Slot 0 is the MLP of folder `source`, the others are like it; the published gates have equal rows."""
    config = json.loads((source / "config.json").read_text())
    old = old_tensors(load_file(source / "model.safetensors"), config["num_hidden_layers"])
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}."
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            own = old.pop(f"{block}mlp.{name}")
            for slot in range(num_slots):
                change = torch.randn(own.shape, generator=generator) * 0.1 * min(slot, 1)
                old[f"{block}moe.mlp.{slot}.{name}"] = own + change
        rows = torch.randn(num_slots, config["hidden_size"], generator=generator)
        old[f"{block}moe.gate.weight"] = rows[:1].repeat(num_slots, 1) if equal_gates else rows
    sizes = {"num_local_experts": num_slots, "num_experts_per_tok": top_k}
    return write_folder(folder, old_config(config, **sizes), old)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
