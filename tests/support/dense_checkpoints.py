"""A tiny random dense model, written by `transformers` as published ones are."""

from __future__ import annotations

from pathlib import Path

import torch
from support.sparse_checkpoints import TINY_MISTRAL
from transformers import MistralConfig, MistralForCausalLM


def write_mistral(folder: Path) -> Path:
    """Three layers in float32; returns `folder`. Always the same weights, and logits far apart."""
    torch.manual_seed(0)
    config = MistralConfig(**TINY_MISTRAL, initializer_range=0.3, sliding_window=None)
    MistralForCausalLM(config).save_pretrained(folder)
    return folder
