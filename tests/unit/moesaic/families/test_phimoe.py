"""Phi-3.5-MoE: the sparse mixer, and biases nearly everywhere."""

from __future__ import annotations

import pytest
from support.tiny_families import tiny_index, with_config

from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention, GateRule


def test_two_experts_are_chosen_by_the_sparse_mixer() -> None:
    model = describe_model(tiny_index("phimoe", router_jitter_noise=0.02))
    assert model.experts[0].gate == GateRule(2, score="logit", weight="sparse_mixer", jitter=0.02)


@pytest.mark.parametrize("joined", [False, True])
def test_the_gate_is_called_router_in_the_modules(joined: bool) -> None:
    model = describe_model(tiny_index("phimoe", joined=joined))
    source = "mlp.router.weight" if joined else "block_sparse_moe.gate.weight"
    assert model.dense["model.layers.2.mlp.router.weight"].source == f"model.layers.2.{source}"


def test_norms_and_if_the_config_says_so_the_head_have_biases() -> None:
    dense = describe_model(tiny_index("phimoe", lm_head_bias=True)).dense
    assert dense["model.norm.bias"].shape == dense["model.layers.0.input_layernorm.bias"].shape == (32,)
    assert dense["lm_head.bias"].shape == (96,)
    assert "lm_head.bias" not in describe_model(tiny_index("phimoe")).dense


def test_all_layers_have_the_window() -> None:
    model = describe_model(tiny_index("phimoe", sliding_window=16))
    assert model.mixers == (Attention(num_heads=4, num_kv_heads=2, head_dim=8, window=16),) * 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_per_tok", 1),
        ("router_jitter_noise", "a little"),
        ("num_local_experts", 8),
        ("intermediate_size", 25),
        ("lm_head_bias", 0),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(tiny_index("phimoe"), **{key: value}))
    assert refused.value.field == f"config.json: {key}"
