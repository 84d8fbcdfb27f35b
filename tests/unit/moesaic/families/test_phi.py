"""Phi-2 new and old, and Phixtral: described whole, the same model by whatever layout, and a wrong config by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.described_tensors import read_described
from support.phi_checkpoints import write_folder, write_old_phi, write_phixtral
from transformers import PhiConfig, PhiForCausalLM

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention, ExpertModule, GateRule, MoeModel


def write_phi(folder: Path, **changes: Any) -> Path:
    """Random weights, biases and norms too, as transformers writes them."""
    values: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
    }
    torch.manual_seed(3)
    model = PhiForCausalLM(PhiConfig(**{**values, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi(tmp_path_factory.mktemp("phi"))


def described(folder: Path, **changes: Any) -> tuple[MoeModel, dict[str, torch.Tensor]]:
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint, **changes)
    return model, read_described(checkpoint, model)


def test_a_dense_phi_is_one_expert_a_layer(phi: Path) -> None:
    model, tensors = described(phi)
    assert model.family == "phi"
    assert model.mixers == (Attention(4, 4, 10),) * 2
    layer = model.experts[1]
    assert (layer.num_slots, layer.gate) == (1, None)
    assert layer.module == ExpertModule(40, 48, "gelu_new", gated=False, biased=True)
    stored = load_file(phi / "model.safetensors")
    assert torch.equal(tensors["1.0.down_bias"], stored["model.layers.1.mlp.fc2.bias"])
    assert model.num_parameters == sum(tensor.numel() for tensor in stored.values())


def test_the_router_can_hold_the_mlps_itself(phi: Path) -> None:
    model, tensors = described(phi, dense_layers="router")
    assert not model.experts
    assert tensors.keys() == load_file(phi / "model.safetensors").keys()


@pytest.mark.parametrize("dense_layers", ["experts", "router"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_the_old_layout_is_the_same_model(tmp_path: Path, dense_layers: Any, num_kv_heads: int) -> None:
    new = write_phi(tmp_path / "new", num_key_value_heads=num_kv_heads)
    old = write_old_phi(tmp_path / "old", new, n_head_kv=num_kv_heads)
    model, tensors = described(new, dense_layers=dense_layers)
    old_model, old_tensors = described(old, dense_layers=dense_layers)
    assert old_tensors.keys() == tensors.keys()
    assert all(torch.equal(old_tensors[name], tensor) for name, tensor in tensors.items())
    assert (old_model.family, old_model.mixers, old_model.num_parameters) == (
        model.family,
        model.mixers,
        model.num_parameters,
    )


def test_the_old_config_says_the_same_in_the_words_of_transformers(tmp_path: Path, phi: Path) -> None:
    values = describe_model(open_checkpoint(write_old_phi(tmp_path, phi))).transformers_config
    assert values is not None
    new = PhiConfig.from_pretrained(phi)
    assert values == {key: getattr(new, key) for key in values}
    assert values.keys() > {"hidden_act", "layer_norm_eps", "max_position_embeddings", "rope_parameters"}


def test_the_inner_size_is_four_times_the_hidden_size_where_the_old_config_says_none(tmp_path: Path) -> None:
    new = write_phi(tmp_path / "new", intermediate_size=160)
    model = describe_model(open_checkpoint(write_old_phi(tmp_path / "old", new, n_inner=None)))
    assert model.experts[0].module.inner_size == 160


@pytest.mark.parametrize("head_dim", range(4, 130, 2))
def test_every_number_of_rotary_dimensions_survives_as_a_share(head_dim: int) -> None:
    from moesaic.families.config import Config
    from moesaic.families.phi import _rotary_share

    for rotary_dim in range(2, head_dim + 1, 2):
        assert int(head_dim * _rotary_share(Config({"rotary_dim": rotary_dim}), head_dim)) == rotary_dim


def test_a_vocabulary_is_padded_as_the_old_code_pads_it(tmp_path: Path, phi: Path) -> None:
    assert describe_model(open_checkpoint(write_old_phi(tmp_path, phi, vocab_size=65))).vocab_size == 128


def test_phixtral_is_a_phi_with_several_mlps_in_a_block(tmp_path: Path, phi: Path) -> None:
    folder = write_phixtral(tmp_path, phi, num_slots=3, top_k=2, seed=1)
    model, tensors = described(folder)
    assert model.family == "phixtral"
    layer = model.experts[0]
    assert (layer.num_slots, layer.gate) == (3, GateRule(2, score="logit", weight="softmax"))
    dense, dense_tensors = described(phi)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in dense_tensors.items())
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["model.layers.1.mlp.gate.weight"], stored["transformer.h.1.moe.gate.weight"])
    assert torch.equal(tensors["1.2.up"], stored["transformer.h.1.moe.mlp.2.fc1.weight"])
    assert model.num_parameters == sum(tensor.numel() for tensor in stored.values())
    assert dense.num_parameters < model.num_active_parameters < model.num_parameters


def test_a_tied_head_keeps_its_own_bias(tmp_path: Path) -> None:
    model, tensors = described(write_phi(tmp_path, tie_word_embeddings=True))
    assert model.tied
    assert "lm_head.weight" not in tensors
    assert "lm_head.bias" in tensors


def test_normed_queries_and_keys_are_described(tmp_path: Path) -> None:
    folder = write_phi(tmp_path, qk_layernorm=True)
    _, tensors = described(folder)
    assert tensors["model.layers.0.self_attn.q_layernorm.bias"].shape == (10,)


def fails(folder: Path) -> str | None:
    with pytest.raises(CheckpointError) as caught:
        describe_model(open_checkpoint(folder))
    return caught.value.field


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"n_embd": 44}, "n_embd"),
        ({"n_embd": None}, "n_embd"),
        ({"n_layer": 1}, "n_layer"),
        ({"n_inner": 40}, "n_inner"),
        ({"n_inner": "x"}, "n_inner"),
        ({"n_head": 0}, "n_head"),
        ({"n_head_kv": 3}, "n_head_kv"),
        ({"vocab_size": 129}, "vocab_size"),
        ({"rotary_dim": 12}, "rotary_dim"),
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"rotary_dim": None}, "rotary_dim"),
        ({"activation_function": "gelu_other"}, "activation_function"),
        ({"n_positions": None}, "n_positions"),
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"img_processor": {"kind": "clip"}}, "img_processor"),
        ({"num_local_experts": 2}, "num_local_experts"),
    ],
)
def test_a_wrong_old_config_is_refused_by_the_key_as_the_file_spells_it(
    tmp_path: Path, phi: Path, changes: dict[str, Any], key: str
) -> None:
    assert fails(write_old_phi(tmp_path, phi, **changes)) == f"config.json: {key}"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_local_experts": 4}, "num_local_experts"),
        ({"num_local_experts": None}, "num_local_experts"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok"),
    ],
)
def test_a_wrong_number_of_experts_is_refused_by_its_key(
    tmp_path: Path, phi: Path, changes: dict[str, Any], key: str
) -> None:
    folder = write_phixtral(tmp_path, phi, num_slots=3, top_k=2, seed=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert fails(folder) == f"config.json: {key}"


@pytest.mark.parametrize(
    "name", ["lm_head.bias", "model.layers.1.mlp.fc1.bias", "model.layers.0.self_attn.k_proj.bias"]
)
def test_a_missing_bias_is_named(tmp_path: Path, phi: Path, name: str) -> None:
    tensors = load_file(phi / "model.safetensors")
    del tensors[name]
    config = json.loads((phi / "config.json").read_text())
    assert fails(write_folder(tmp_path, config, tensors)) == name


def test_a_tensor_that_is_left_over_is_named(tmp_path: Path, phi: Path) -> None:
    folder = write_old_phi(tmp_path, phi)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "transformer.h.0.mixer.extra": torch.zeros(1)}, folder / "model.safetensors")
    assert fails(folder) == "transformer.h.0.mixer.extra"


@pytest.mark.shared
def test_the_golden_is_described_in_every_layout(shared: Path, tmp_path: Path) -> None:
    golden = shared / "goldens" / "phi-2" / "checkpoint"
    _, tensors = described(golden)
    _, old = described(write_old_phi(tmp_path / "old", golden))
    assert old.keys() == tensors.keys()
    assert all(torch.equal(old[name], tensor) for name, tensor in tensors.items())
    _, several = described(write_phixtral(tmp_path / "phixtral", golden, num_slots=4, top_k=2, seed=2))
    assert several.keys() > tensors.keys()
