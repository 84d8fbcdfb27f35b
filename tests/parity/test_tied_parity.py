"""Folders whose config ties parameters and whose files say otherwise, against transformers on the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoder_decoders import greedy, switch_logits, write_nllb, write_switch
from support.local_router import lonely_router
from support.random_models import random_model, reference_logits, write_model
from support.tiny_families import SIZES, TINY
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    NllbMoeForConditionalGeneration,
    SwitchTransformersForConditionalGeneration,
)

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.families import describe_model

LOGITS_TOLERANCE = 1e-4
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = [1, 9, 30, 77, 5, 88, 13]
CONFIGS: dict[str, dict[str, Any]] = {
    **TINY,
    "deepseek_v2": TINY["deepseek_v2"] | {"num_key_value_heads": 4},
    "deepseek_v3": TINY["deepseek_v3"] | {"num_key_value_heads": 4},
    "llama": {},
    "ministral": {"sliding_window": 5, "head_dim": 8},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4},
    "phi": {"num_key_value_heads": 4},
}
LEAN = {"llama", "ministral", "mistral", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
RUNS = [(family, decoder) for family in sorted(CONFIGS) for decoder in ("lean", "hf")[family not in LEAN :]]

Tensors = dict[str, torch.Tensor]


def noise_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) / tensor.shape[-1] ** 0.5


def with_own_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: noise_like(tensors[EMBEDDING], 1)}


def with_copied_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


def with_head_alone(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


STORED: dict[str, Callable[[Tensors], Tensors]] = {
    "a head of its own": with_own_head,
    "an equal copy": with_copied_head,
    "the head alone": with_head_alone,
}


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def write_tied(folder: Path, family: str, stored: str) -> None:
    config = SIZES | CONFIGS[family] | {"tie_word_embeddings": True}
    if family == "phi":
        del config["num_experts_per_tok"]
    if "sliding_window" in CONFIG_MAPPING[family]().to_dict():
        config.setdefault("sliding_window", 5)
    write_model(random_model(family, 3, **config), folder)
    rewrite(folder, STORED[stored])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("family", "decoder"), RUNS)
def test_the_tensors_in_the_files_count_where_a_config_ties_them(
    tmp_path: Path, family: str, decoder: str, stored: str
) -> None:
    write_tied(tmp_path, family, stored)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    logits, outputs = lonely_router(tmp_path, decoder=decoder).run([PROMPT], num_new=2, max_batch_tokens=512)
    expected = reference_logits(reference, PROMPT + outputs[0])
    torch.testing.assert_close(logits[0], expected, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "phi", "minimax_m2", "deepseek_v3"])
@pytest.mark.parametrize("stored", STORED)
def test_a_parameter_counts_once_for_all_that_it_is(tmp_path: Path, family: str, stored: str) -> None:
    write_tied(tmp_path, family, stored)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    described = describe_model(open_checkpoint(tmp_path))
    buffers = sum(tensor.numel() for name, tensor in reference.state_dict().items() if "correction" in name)
    assert described.num_parameters == reference.num_parameters() + buffers
    assert described.untied == ((HEAD,) if stored == "a head of its own" else ())
    assert described.tied == (stored != "a head of its own")


SWITCH = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
NLLB = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)
# Which of the four are stored with values of their own; a letter that is missing is not stored, the same letter is a copy.
OF_BOTH_SIDES = ["a..b", "ab..", "a.b.", "abcd", "abab", ".a..", "..ab", "...a", "aaaa"]


def stored_as(names: tuple[str, ...], letters: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        shared = tensors[names[0]]
        rest = {name: tensor for name, tensor in tensors.items() if name not in names}
        own = {
            name: noise_like(shared, ord(letter))
            for name, letter in zip(names, letters, strict=True)
            if letter != "."
        }
        return rest | own

    return change


@pytest.mark.parametrize("letters", OF_BOTH_SIDES)
def test_each_embedding_of_a_switch_counts_where_it_is_stored(tmp_path: Path, letters: str) -> None:
    write_switch(tmp_path, 0)
    rewrite(tmp_path, stored_as(SWITCH, letters))
    reference = SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    ).eval()
    expected, tokens = greedy(switch_logits(reference), [5, 9, 33, 2], 4, start=0)
    logits, outputs = lonely_router(tmp_path).run([[5, 9, 33, 2]], num_new=3, max_batch_tokens=64)
    torch.testing.assert_close(logits[0], expected, atol=LOGITS_TOLERANCE, rtol=0)
    assert outputs[0] == tokens[:3]
    described = describe_model(open_checkpoint(tmp_path))
    assert described.num_parameters == reference.num_parameters()


@pytest.mark.parametrize("letters", OF_BOTH_SIDES)
def test_each_embedding_of_an_nllb_counts_where_it_is_stored(tmp_path: Path, letters: str) -> None:
    # Without experts, which transformers computes wrongly.
    write_nllb(tmp_path, 0, encoder_sparse_step=0, decoder_sparse_step=0)
    rewrite(tmp_path, stored_as(NLLB, letters))
    reference = NllbMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = [5, 9, 33, 2]
    logits, outputs = lonely_router(tmp_path).run([prompt], num_new=3, max_batch_tokens=64)
    with torch.inference_mode():
        answer = torch.tensor([[reference.config.decoder_start_token_id, *outputs[0]]])
        expected = reference(input_ids=torch.tensor([prompt]), decoder_input_ids=answer).logits[0]
    torch.testing.assert_close(logits[0], expected, atol=LOGITS_TOLERANCE, rtol=0)
