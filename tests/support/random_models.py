"""Tiny random models of any family of transformers: written as a checkpoint, and as a reference for what comes out of it.

Weights are fan-in scaled, so that logits have a standard deviation near one and routing decisions are seldom near ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def random_model(family: str, seed: int, **config: Any) -> PreTrainedModel:
    """In float32, with the plain attention and the plain loop over experts."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **config),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * _scale(name, tensor) + (1 if _is_norm(name, tensor) else 0))
    return model


def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V], of the whole sequence in one pass without a cache."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def write_model(model: PreTrainedModel, folder: Path) -> Path:
    """As published checkpoints lie."""
    model.save_pretrained(folder)
    return folder


def _is_norm(name: str, tensor: torch.Tensor) -> bool:
    return "norm" in name and name.endswith("weight") and tensor.dim() == 1


def _scale(name: str, tensor: torch.Tensor) -> float:
    if tensor.dim() == 1 or "bias" in name:
        return 0.1
    if "embed_tokens" in name:
        return 1.0
    # Experts of some families lie transposed, [E, I, O].
    inputs = tensor.shape[-2] if _is_transposed(name, tensor) else tensor.shape[-1]
    return 1 / math.sqrt(inputs)


def _is_transposed(name: str, tensor: torch.Tensor) -> bool:
    wide = max(tensor.shape[-2:])
    return tensor.dim() == 3 and name.endswith("gate_up_proj") and tensor.shape[-1] == wide
