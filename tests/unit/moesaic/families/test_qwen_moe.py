"""Qwen2-MoE and Qwen3-MoE: which layers have experts, which have windows, and which configs are refused."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_families import tiny_index, with_config

from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention, ExpertModule, GateRule, MoeModel


def windows(model: MoeModel) -> list[int | None]:
    return [mixer.window for mixer in model.mixers if isinstance(mixer, Attention)]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("rules", "sparse"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [0, 3]}, [1, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
    ],
)
def test_the_config_says_which_layers_have_experts(
    family: str, rules: dict[str, Any], sparse: list[int]
) -> None:
    model = describe_model(tiny_index(family, num_hidden_layers=4, **rules))
    assert list(model.num_slots) == sparse
    assert all(experts.gate == GateRule(2) for experts in model.experts.values())
    assert {experts.module for experts in model.experts.values()} == {ExpertModule(32, 16, "silu")}


def test_the_shared_expert_and_its_gate_belong_to_the_router() -> None:
    model = describe_model(tiny_index("qwen2_moe"))
    assert model.dense["model.layers.1.mlp.shared_expert.down_proj.weight"].shape == (32, 20)
    assert model.dense["model.layers.1.mlp.shared_expert_gate.weight"].shape == (1, 32)


def test_every_second_layer_of_a_qwen2_has_the_window_if_it_is_in_use() -> None:
    index = tiny_index("qwen2_moe", sliding_window=8, use_sliding_window=True, max_window_layers=2)
    assert windows(describe_model(index)) == [8, None, None]
    listed = with_config(
        index, layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=16
    )
    assert windows(describe_model(listed)) == [None, 16, None]
    unlisted = with_config(index, "layer_types")
    assert windows(describe_model(unlisted)) == [8, None, None]
    assert windows(describe_model(with_config(unlisted, use_sliding_window=False))) == [None] * 3


def test_all_layers_of_a_qwen3_have_the_window_if_it_is_in_use() -> None:
    index = tiny_index("qwen3_moe", sliding_window=8, use_sliding_window=True)
    assert windows(describe_model(index)) == [8] * 3
    assert windows(describe_model(with_config(index, use_sliding_window=False))) == [None] * 3
    assert windows(describe_model(with_config(index, "sliding_window"))) == [4096] * 3
    assert windows(describe_model(with_config(index, sliding_window=None))) == [None] * 3


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_goes_by_either_name(spelling: str) -> None:
    index = with_config(tiny_index("qwen3_moe"), "num_local_experts", "num_experts", **{spelling: 4})
    assert describe_model(index).num_slots == dict.fromkeys(range(3), 4)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 48),
        ("hidden_act", "gelu"),
        ("vocab_size", 95),
        ("moe_intermediate_size", 24),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_experts_per_tok", 5),
        ("mlp_only_layers", [0, 1, 2]),
        ("mlp_only_layers", "1"),
        ("decoder_sparse_step", 7),
        ("norm_topk_prob", 1),
        ("tie_word_embeddings", "no"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(family: str, key: str, value: object) -> None:
    index = with_config(tiny_index(family), "layer_types", **{key: value})
    with pytest.raises(CheckpointError) as refused:
        describe_model(index)
    assert refused.value.field == f"config.json: {key}"


@pytest.mark.parametrize(
    ("kinds", "problem"),
    [
        (["full_attention", "linear_attention", "full_attention"], "'linear_attention' is not served"),
        (["full_attention"], "num_hidden_layers, 3"),
        ([None] * 3, "'None' is not served"),
    ],
)
def test_layers_of_an_unserved_kind_are_refused(kinds: list[str], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as refused:
        describe_model(with_config(tiny_index("qwen2_moe"), layer_types=kinds))
    assert refused.value.field == "config.json: layer_types"


def test_a_number_of_experts_that_the_tensors_deny_is_refused_by_the_key_that_is_there() -> None:
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(tiny_index("qwen2_moe"), num_experts=6))
    assert refused.value.field == "config.json: num_experts"


def test_a_missing_bias_is_refused_by_its_name() -> None:
    index = tiny_index("qwen2_moe", qkv_bias=False)
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(index, qkv_bias=True))
    assert refused.value.field == "model.layers.0.self_attn.q_proj.bias"
