"""Tiny random checkpoints, written the way real ones are: by `transformers`, in the classic and in the fused layout.

The same seed gives the same weights in either layout. Weights are fan-in scaled, so that logits have a standard
deviation near one and routing decisions are seldom near ties.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import MixtralConfig, MixtralForCausalLM

Layout = Literal["classic", "fused"]

TINY_MIXTRAL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}


def write_mixtral(
    folder: Path,
    *,
    layout: Layout = "classic",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
    **config_overrides: Any,
) -> Path:
    """Writes config.json and the weights (several shards when `max_shard_size` is small); returns `folder`."""
    model = random_mixtral(seed=seed, **config_overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=layout == "classic")
    return folder


def random_mixtral(*, seed: int = 0, **config_overrides: Any) -> MixtralForCausalLM:
    """The model that `write_mixtral` writes, in float32: a reference for what comes out of the checkpoint."""
    model = MixtralForCausalLM(MixtralConfig(**TINY_MIXTRAL | config_overrides)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    return model
