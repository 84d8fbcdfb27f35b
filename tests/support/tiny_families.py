"""Tiny random checkpoints of every family, written the way real ones are: by `transformers`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.checkpoints.safetensors_file import TensorEntry

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_SIGMOID: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}

# What each family's config says besides the sizes, or otherwise.
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "flex_olmo": {"num_experts": 4},
    "glm4_moe": _SIGMOID,
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
    "granitemoe": {"num_local_experts": 4},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "head_dim": 8,
        "attention_chunk_size": 16,
    },
    "olmoe": {"num_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 12},
    # Without a module of their own.
    "afmoe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "num_dense_layers": 1},
    "cohere2_moe": {"num_experts": 4, "head_dim": 8},
    "dots1": {**_SIGMOID, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "flint": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [0],
    },
    "glm4_moe_lite": {**_LATENT, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    "granitemoe_swa": {"num_local_experts": 4, "head_dim": 8, "shared_intermediate_size": 20},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 20},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "hy_v3": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "kolibri1": {
        "num_local_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "shared_expert_intermediate_size": 20,
    },
    "mellum": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "minimax_m2": {"num_local_experts": 4, "head_dim": 8},
    "solar_open": _SIGMOID,
}


def random_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """In float32. Every tensor is random, buffers that are saved as well, so that none can pass for another."""
    config_class = CONFIG_MAPPING[family]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config_class(**SIZES | TINY[family] | overrides), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(model.state_dict().items()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def write_family(folder: Path, model: PreTrainedModel, *, joined: bool = False) -> Path:
    """With the names of published checkpoints, or `joined` as transformers has the experts in memory."""
    model.save_pretrained(folder, save_original_format=not joined)
    return folder


def tiny_index(family: str, *, joined: bool = False, **overrides: Any) -> Checkpoint:
    """Config and tensor entries of a tiny model, whose files are gone: enough to describe it by."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(family, **overrides)
        return open_checkpoint(write_family(Path(folder), model, joined=joined))


def with_config(checkpoint: Checkpoint, *remove: str, **changes: Any) -> Checkpoint:
    config = {key: value for key, value in checkpoint.config.items() if key not in remove}
    return replace(checkpoint, config=config | changes)


def with_entries(checkpoint: Checkpoint, *entries: TensorEntry) -> Checkpoint:
    """With these tensors added or in place of those by the same name."""
    return replace(checkpoint, tensors={**checkpoint.tensors, **{entry.name: entry for entry in entries}})


def an_entry(name: str, dtype: str, *shape: int) -> TensorEntry:
    """The bytes of it are nowhere."""
    return TensorEntry(name, Path("model.safetensors"), dtype, shape, first_byte=0, num_bytes=0)
