"""Mistral, Ministral and Llama: dense decoders whose MLPs are experts, or tensors of the router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY_MIXTRAL
from support.mistral_checkpoints import randomise
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from moesaic.checkpoints.checkpoint import SINGLE_FILE, open_checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel, describe_model
from moesaic.families.model import Attention, ExpertModule

TINY = {key: value for key, value in TINY_MIXTRAL.items() if "expert" not in key} | {
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
BUILDS = {
    "mistral": (MistralForCausalLM, MistralConfig),
    "ministral": (MinistralForCausalLM, MinistralConfig),
    "llama": (LlamaForCausalLM, LlamaConfig),
}


def write(folder: Path, family: str, **overrides: Any) -> Path:
    build, config = BUILDS[family]
    randomise(build(config(**TINY | overrides))).save_pretrained(folder)
    return folder


def describe(folder: Path) -> MoeModel:
    return describe_model(open_checkpoint(folder))


def windows(model: MoeModel) -> list[int | None]:
    return [mixer.window for mixer in model.mixers if isinstance(mixer, Attention)]


def edit_config(folder: Path, *remove: str, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        describe(folder)
    return caught.value


@pytest.mark.parametrize("family", BUILDS)
def test_a_dense_model_has_one_expert_a_layer_that_takes_every_token(tmp_path: Path, family: str) -> None:
    model = describe(write(tmp_path, family))
    assert (model.family, model.num_layers, model.dtype) == (family, 2, "float32")
    assert model.num_slots == {0: 1, 1: 1}
    for experts in model.experts.values():
        assert experts.gate is None and experts.top_k == 1
        assert experts.module == ExpertModule(hidden_size=32, inner_size=24, activation="silu")
    assert model.num_parameters == model.num_active_parameters


@pytest.mark.parametrize("family", BUILDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_transformers_is_described(tmp_path: Path, family: str, tied: bool) -> None:
    folder = write(tmp_path, family, tie_word_embeddings=tied)
    model = describe_model(open_checkpoint(folder), "router")
    build, config = BUILDS[family]
    reference = build(config(**TINY | {"tie_word_embeddings": tied}))
    assert {name: tensor.shape for name, tensor in model.dense.items()} == {
        name: tuple(parameter.shape) for name, parameter in reference.named_parameters()
    }
    assert (model.experts, model.tied) == ({}, tied)


def test_a_window_is_read_and_only_null_means_none(tmp_path: Path) -> None:
    folder = write(tmp_path, "mistral", sliding_window=16)
    assert windows(describe(folder)) == [16, 16]
    edit_config(folder, sliding_window=None)
    assert windows(describe(folder)) == [None, None]
    edit_config(folder, "sliding_window")
    assert windows(describe(folder)) == [MistralConfig().sliding_window] * 2


def test_a_window_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "mistral")
    edit_config(folder, sliding_window=0)
    assert refusal(folder).field == "config.json: sliding_window"


def test_the_layers_of_a_ministral_have_a_window_or_none(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    folder = write(tmp_path, "ministral", sliding_window=8, layer_types=kinds)
    assert windows(describe(folder)) == [None, 8]
    edit_config(folder, "layer_types")
    assert windows(describe(folder)) == [8, 8]
    edit_config(folder, layer_types=["full_attention", "chunked_attention"])
    assert refusal(folder).field == "config.json: layer_types"


def test_a_llama_has_no_window_whatever_its_config_says(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama")
    edit_config(folder, sliding_window=8)
    assert windows(describe(folder)) == [None, None]


def test_the_biases_of_a_llama_are_those_of_projections_and_experts(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    model = describe(folder)
    assert model.dense["model.layers.1.self_attn.o_proj.bias"].shape == (32,)
    assert model.dense["model.layers.1.self_attn.k_proj.bias"].shape == (16,)
    experts = model.experts[1]
    assert (
        experts.module.biased
        and experts.layout["down_bias"].name(1, 0) == "model.layers.1.mlp.down_proj.bias"
    )
    assert "model.layers.0.mlp.up_proj.bias" in describe_model(open_checkpoint(folder), "router").dense


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 40), ("intermediate_size", 40), ("vocab_size", 97), ("num_hidden_layers", 1),
     ("num_key_value_heads", 3), ("hidden_act", "gelu"), ("quantization_config", "fp8")],
)  # fmt: skip
def test_a_config_that_does_not_match_is_refused_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    folder = write(tmp_path, "mistral")
    edit_config(folder, **{key: value})
    assert refusal(folder).field == f"config.json: {key}"


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, "mistral")
    tensors = load_file(folder / SINGLE_FILE)
    del tensors[name]
    save_file(tensors, folder / SINGLE_FILE)
    assert refusal(folder).field == name


def test_an_mlp_of_another_dtype_than_the_first_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = write(tmp_path, "mistral")
    tensors = load_file(folder / SINGLE_FILE)
    save_file({**tensors, name: tensors[name].to(torch.bfloat16)}, folder / SINGLE_FILE)
    assert refusal(folder).field == name


@pytest.mark.shared
@pytest.mark.parametrize("golden", ["mistral-dense/checkpoint", "mistral-sliding-window/hf_v4"])
def test_the_reference_models_are_described(shared: Path, golden: str) -> None:
    model = describe(shared / "goldens" / golden)
    assert (model.family, model.num_layers) == ("mistral", 3)
    assert windows(model) == [8 if "sliding" in golden else None] * 3
