"""What a StripedHyena checkpoint is, by its config and its tensors; and what is refused of it, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.striped_hyena import EVO, TINY, write_striped_hyena

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel, describe_model
from moesaic.families.config import Config
from moesaic.families.model import Attention, ExpertModule, Hyena
from moesaic.families.stripedhyena import Arithmetic, read_arithmetic


def describe(folder: Path, **config: Any) -> MoeModel:
    return describe_model(open_checkpoint(write_striped_hyena(folder, **config)))


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_both_published_namings_are_one_model(tmp_path: Path, prefix: str) -> None:
    model = describe(tmp_path, prefix=prefix)
    hyena, attention = Hyena(2, 3, 4), Attention(4, 2, 8)
    assert model.family == "stripedhyena" and model.mixers == (hyena, attention) * 2
    assert model.max_model_len == 256 and not model.tied
    assert set(model.experts) == {0, 1, 2, 3}
    experts = model.experts[2]
    assert experts.gate is None and experts.num_slots == 1 and experts.module == ExpertModule(32, 40, "silu")
    assert {weight: pattern.name(2, 0) for weight, pattern in experts.layout.items()} == {
        "gate": f"{prefix}blocks.2.mlp.l1.weight",
        "up": f"{prefix}blocks.2.mlp.l2.weight",
        "down": f"{prefix}blocks.2.mlp.l3.weight",
    }
    assert model.dense["blocks.0.filter.poles"].source == f"{prefix}blocks.0.filter.poles"
    assert model.dense["blocks.1.inner_mha_cls.Wqkv.weight"].shape == (64, 32)
    assert model.ignored == {f"{prefix}blocks.{layer}.inner_mha_cls.rotary_emb.inv_freq" for layer in (1, 3)}
    in_router = model.placing("router")
    assert not in_router.experts and in_router.num_parameters == model.num_parameters
    assert in_router.dense["blocks.2.mlp.l3.weight"].shape == (32, 40)


def test_an_evo_is_described_by_the_same_words(tmp_path: Path) -> None:
    model = describe(tmp_path, **EVO)
    assert model.mixers[0] == Hyena(8, 3, 4) and model.mixers[1] == Attention(4, 4, 8)
    # int(8 / 3 * 32), filled up to a multiple of 16.
    assert model.experts[0].module == ExpertModule(32, 96, "gelu")
    assert model.tied and "unembed.weight" not in model.dense
    assert model.dense["blocks.1.inner_mha_cls.out_proj.bias"].shape == (32,)
    assert read_arithmetic(Config(TINY | EVO)) == Arithmetic(
        norm_eps=1e-3,
        eps_inside_root=False,
        rotary_base=10000.0,
        rotary_scaling=16.0,
        split_by_head=True,
        activation="gelu",
    )


def test_the_scaling_of_positions_needs_the_switch() -> None:
    arithmetic = read_arithmetic(Config(TINY | {"rotary_emb_scaling_factor": 16}))
    assert arithmetic.rotary_scaling == 1.0 and arithmetic.eps_inside_root


def test_poles_and_residues_are_wider_than_the_rest(tmp_path: Path) -> None:
    assert describe(tmp_path, dtype=torch.bfloat16).dtype == "bfloat16"


def test_a_tied_model_may_carry_its_head_all_the_same(tmp_path: Path) -> None:
    folder = write_striped_hyena(tmp_path, **EVO)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.unembed.weight"] = tensors["backbone.embedding_layer.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "backbone.unembed.weight" in describe_model(open_checkpoint(folder)).ignored


@pytest.mark.parametrize(
    "name",
    [
        "backbone.blocks.0.filter.t",
        "backbone.blocks.0.filter.fftconv_fn.twiddle_factors_fft_32",
        "backbone.blocks.0.filter._extra_state",
        "backbone.blocks.1.inner_mha_cls.rotary_emb.inv_freq",
    ],
)
def test_buffers_that_are_computed_are_not_read(tmp_path: Path, name: str) -> None:
    folder = write_striped_hyena(tmp_path)
    tensors = load_file(folder / "model.safetensors") | {name: torch.zeros(3)}
    save_file(tensors, folder / "model.safetensors")
    assert name in describe_model(open_checkpoint(folder)).ignored


REFUSED: dict[str, dict[str, Any]] = {
    "hyena_filter_groups": {"hyena_filter_groups": 2},
    "hcl_layer_idxs": {"hcl_layer_idxs": [0]},
    "some_new_key": {"some_new_key": 1},
    "final_norm": {"final_norm": False},
    "mlp_activation": {"mlp_activation": "relu"},
    "proj_groups": {"proj_groups": 3},
    "num_attention_heads": {"num_attention_heads": 5},
    "attn_layer_idxs": {"attn_layer_idxs": [1, 7]},
    "hyena_layer_idxs": {"hyena_layer_idxs": [0]},
    "eps": {"eps": None},
    "rotary_emb_base": {"rotary_emb_base": None},
    "inner_mlp_size": {"inner_mlp_size": 48},
    "state_size": {"state_size": 4},
    "num_layers": {"num_layers": 2, "attn_layer_idxs": [1]},
    "max_seqlen": {"max_seqlen": "long"},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_understood_is_refused_by_its_key(tmp_path: Path, key: str) -> None:
    folder = write_striped_hyena(tmp_path)
    (folder / "config.json").write_text(json.dumps(TINY | REFUSED[key]))
    with pytest.raises(CheckpointError) as refused:
        describe_model(open_checkpoint(folder))
    assert refused.value.field == f"config.json: {key}"


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"qkv_proj_bias": True}, "backbone.blocks.1.inner_mha_cls.Wqkv.bias"),
        ({"proj_groups": 4}, "backbone.blocks.1.inner_mha_cls.Wqkv.weight"),
        ({"smeared_gqa": True}, "backbone.blocks.1.inner_mha_cls.Wqkv.weight"),
        ({"short_filter_bias": False}, "backbone.blocks.0.filter.short_filter_bias"),
        ({"short_filter_length": 4}, "backbone.blocks.0.filter.short_filter_weight"),
    ],
)
def test_where_tensors_are_not_what_the_config_says_the_tensor_is_named(
    tmp_path: Path, change: dict[str, Any], tensor: str
) -> None:
    folder = write_striped_hyena(tmp_path)
    (folder / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(CheckpointError) as refused:
        describe_model(open_checkpoint(folder))
    assert refused.value.field == tensor


def test_a_head_that_differs_from_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_striped_hyena(tmp_path, **EVO)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.unembed.weight"] = tensors["backbone.embedding_layer.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor backbone\.unembed\.weight differs from") as error:
        describe_model(open_checkpoint(folder))
    assert error.value.field == "config.json: tie_embeddings"
