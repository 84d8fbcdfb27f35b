"""The model that a checkpoint describes, and what happens where its config and its tensors disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import Layout, write_mixtral

from moesaic.checkpoints.checkpoint import SINGLE_FILE, open_checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel, describe_model
from moesaic.families.model import Attention, ExpertModule, GateRule, WeightPattern


@pytest.fixture(params=["classic", "fused"])
def layout(request: pytest.FixtureRequest) -> Layout:
    chosen: Layout = request.param
    return chosen


@pytest.fixture
def folder(tmp_path: Path, layout: Layout) -> Path:
    return write_mixtral(tmp_path / layout, layout=layout)


def describe(folder: Path) -> MoeModel:
    return describe_model(open_checkpoint(folder))


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        describe(folder)
    return caught.value


def edit_config(folder: Path, *remove: str, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors by name, with `/` for the dots; None removes one."""
    tensors = load_file(folder / SINGLE_FILE)
    for name, tensor in changes.items():
        tensors.pop(name.replace("/", "."), None)
        if tensor is not None:
            tensors[name.replace("/", ".")] = tensor.contiguous()
    save_file(tensors, folder / SINGLE_FILE)


def test_a_mixtral_is_described_alike_in_either_layout(folder: Path) -> None:
    model = describe(folder)
    assert (model.family, model.dtype, model.num_layers, model.hidden_size) == ("mixtral", "float32", 2, 32)
    assert (model.vocab_size, model.max_model_len, model.tied) == (96, 256, False)
    assert model.mixers == (Attention(num_heads=4, num_kv_heads=2, head_dim=8, window=None),) * 2
    assert model.num_slots == {0: 4, 1: 4}
    for layer, experts in model.experts.items():
        assert experts.module == ExpertModule(hidden_size=32, inner_size=24, activation="silu")
        assert experts.gate == GateRule(top_k=2, renormalise=True)
        assert model.expert_bytes(layer) == 3 * 32 * 24 * 4


def test_the_tensors_of_the_router_are_alike_in_either_layout(tmp_path: Path) -> None:
    classic, fused = (
        describe(write_mixtral(tmp_path / layout, layout=layout)) for layout in ("classic", "fused")
    )
    gate = "model.layers.1.mlp.gate.weight"
    assert classic.dense[gate].source == "model.layers.1.block_sparse_moe.gate.weight"
    assert fused.dense[gate].source == gate
    assert {name: tensor.shape for name, tensor in classic.dense.items()} == {
        name: tensor.shape for name, tensor in fused.dense.items()
    }
    assert all(tensor.rotary_heads is tensor.rows is None for tensor in classic.dense.values())


def test_classic_experts_have_tensors_of_their_own(tmp_path: Path) -> None:
    model = describe(write_mixtral(tmp_path))
    prefix = "model.layers.1.block_sparse_moe.experts.3."
    assert {weight: pattern.name(1, 3) for weight, pattern in model.experts[1].layout.items()} == {
        "gate": prefix + "w1.weight",
        "up": prefix + "w3.weight",
        "down": prefix + "w2.weight",
    }
    assert not any(pattern.stacked for pattern in model.experts[1].layout.values())
    assert len(model.expert_tensors) == 2 * 4 * 3


def test_fused_experts_are_slices_of_stacked_tensors(tmp_path: Path) -> None:
    model = describe(write_mixtral(tmp_path, layout="fused"))
    gate_up, down = (
        "model.layers.{layer}.mlp.experts.gate_up_proj",
        "model.layers.{layer}.mlp.experts.down_proj",
    )
    assert model.experts[1].layout == {
        "gate": WeightPattern(gate_up, stacked=True, part=(0, 2)),
        "up": WeightPattern(gate_up, stacked=True, part=(1, 2)),
        "down": WeightPattern(down, stacked=True),
    }
    assert {gate_up.format(layer=1), down.format(layer=1)} < model.expert_tensors
    assert len(model.expert_tensors) == 4


def test_the_expert_tensors_are_all_that_the_experts_need_and_nothing_else(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    held = {
        pattern.name(address.layer, address.slot)
        for address in model.addresses
        for pattern in model.experts[address.layer].layout.values()
    }
    assert held == model.expert_tensors < checkpoint.tensors.keys()
    share = sum(checkpoint.tensors[name].num_bytes for name in model.expert_tensors)
    assert share == sum(model.expert_bytes(address.layer) for address in model.addresses)


def test_no_tensor_is_both_of_the_router_and_of_an_expert_and_none_is_of_neither(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = describe_model(checkpoint)
    dense = {tensor.source for tensor in model.dense.values()}
    assert not dense & model.expert_tensors
    assert dense | model.expert_tensors == checkpoint.tensors.keys()
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    assert model.num_parameters * 4 == total
    assert model.num_parameters - model.num_active_parameters == 2 * (4 - 2) * 3 * 32 * 24


def test_the_dtype_is_that_of_the_expert_tensors(tmp_path: Path) -> None:
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        model = describe(write_mixtral(tmp_path / name, dtype=dtype))
        assert (model.dtype, model.expert_bytes(0)) == (name, 3 * 32 * 24 * 2)


def test_window_head_dim_and_tied_embeddings_are_understood(tmp_path: Path) -> None:
    model = describe(write_mixtral(tmp_path, sliding_window=16, head_dim=12, tie_word_embeddings=True))
    assert model.mixers[0] == Attention(num_heads=4, num_kv_heads=2, head_dim=12, window=16)
    assert model.tied and "lm_head.weight" not in model.dense


def test_the_number_of_experts_may_be_spelled_num_experts(folder: Path) -> None:
    edit_config(folder, "num_local_experts", num_experts=4)
    assert describe(folder).num_slots == {0: 4, 1: 4}


def test_the_flat_config_of_older_checkpoints_is_understood(folder: Path) -> None:
    edit_config(folder, "rope_parameters", "dtype", rope_theta=1e6, torch_dtype="float32")
    assert describe(folder).max_model_len == 256


def test_an_unknown_family_is_named_beside_what_is_supported(folder: Path) -> None:
    edit_config(folder, model_type="dbrx")
    error = refusal(folder)
    assert error.field == "config.json: model_type"
    assert "'dbrx'" in error.message and "mixtral" in error.message


@pytest.mark.parametrize("model_type", [None, 7, ["mixtral"]])
def test_a_model_type_that_is_no_name_is_refused(folder: Path, model_type: object) -> None:
    edit_config(folder, model_type=model_type)
    assert refusal(folder).field == "config.json: model_type"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 40),
        ("intermediate_size", 40),
        ("num_local_experts", 3),
        ("num_local_experts", 5),
        ("vocab_size", 97),
        ("num_hidden_layers", 1),
        ("num_experts_per_tok", 5),
        ("num_key_value_heads", 3),
        ("hidden_size", 0),
        ("hidden_size", "32"),
        ("hidden_size", 32.0),
        ("num_hidden_layers", True),
        ("sliding_window", -1),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", "no"),
        ("quantization_config", "fp8"),
    ],
)
def test_a_config_that_does_not_match_is_refused_by_its_key(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    assert refusal(folder).field == f"config.json: {key}"


@pytest.mark.parametrize(
    ("quantised", "key"),
    [
        ({"quant_method": "awq"}, "quant_method"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({}, "quant_method"),
    ],
)
def test_a_quantisation_that_is_not_understood_is_refused_by_its_key(
    folder: Path, quantised: dict[str, str], key: str
) -> None:
    edit_config(folder, quantization_config=quantised)
    assert refusal(folder).field == f"config.json: quantization_config.{key}"


@pytest.mark.parametrize("key", ["hidden_size", "num_local_experts", "vocab_size"])
def test_a_missing_config_key_is_named(folder: Path, key: str) -> None:
    edit_config(folder, key)
    error = refusal(folder)
    assert error.field == f"config.json: {key}"
    assert "missing" in error.message


def test_a_default_that_does_not_fit_the_files_is_named_with_its_key(folder: Path) -> None:
    edit_config(folder, "num_local_experts")
    assert "num_local_experts: is missing, and the default of the family, 8, does not match tensor" in (
        refusal(folder).message
    )


def test_a_layer_more_in_the_config_than_on_disk_names_its_first_tensor(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    error = refusal(folder)
    assert error.field is not None and error.field.startswith("model.layers.2.")


@pytest.mark.parametrize(
    "name",
    ["lm_head/weight", "model/norm/weight", "model/layers/1/self_attn/k_proj/weight",
     "model/layers/0/block_sparse_moe/gate/weight", "model/layers/1/block_sparse_moe/experts/2/w2/weight"],
)  # fmt: skip
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    edit_tensors(write_mixtral(tmp_path), **{name: None})
    assert refusal(tmp_path).field == name.replace("/", ".")


def test_a_transposed_expert_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    write_mixtral(tmp_path)
    edit_tensors(tmp_path, **{name: torch.zeros(24, 32)})
    error = refusal(tmp_path)
    assert error.field == name
    assert "[24, 32]" in error.message and "[32, 24]" in error.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float8_e4m3fn])
def test_an_expert_of_another_dtype_than_the_first_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    write_mixtral(tmp_path)
    edit_tensors(tmp_path, **{name: torch.zeros(32, 24).to(dtype)})
    assert refusal(tmp_path).field == name


def test_experts_of_an_unserved_dtype_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    write_mixtral(tmp_path)
    edit_tensors(tmp_path, **{name: torch.zeros(24, 32, dtype=torch.int8)})
    assert "float32" not in refusal(tmp_path).message.split("supported")[0]
    assert refusal(tmp_path).field == name


def test_a_folder_without_expert_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_attention_heads": 4}))
    save_file({"model.norm.weight": torch.zeros(4)}, tmp_path / SINGLE_FILE)
    assert "no known expert layout" in refusal(tmp_path).message


@pytest.mark.shared
def test_the_reference_layouts_are_described_alike(shared: Path) -> None:
    classic, fused = (describe(shared / "goldens" / "mixtral" / name) for name in ("hf_v4", "hf_v5_fused"))
    experts = classic.experts[0]
    assert (experts.num_slots, experts.top_k, experts.module.inner_size) == (8, 2, 40)
    assert classic.expert_bytes(0) == fused.expert_bytes(0)
    assert experts.layout != fused.experts[0].layout
