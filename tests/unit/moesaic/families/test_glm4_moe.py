"""GLM-4-MoE: the gate of DeepSeek-V3 over ordinary attention."""

from __future__ import annotations

import pytest
from support.tiny_families import an_entry, tiny_index, with_config, with_entries

from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention, GateRule, Groups


def test_the_gate_scores_by_sigmoid_and_chooses_by_a_bias() -> None:
    index = tiny_index("glm4_moe", n_routed_experts=8, n_group=2, topk_group=1, routed_scaling_factor=1.5)
    rule = GateRule(
        2,
        score="sigmoid",
        selection_bias=True,
        groups=Groups(2, 1, best=2),
        renormalise=True,
        epsilon=1e-20,
        scale=1.5,
    )
    assert describe_model(index).experts[1].gate == rule


def test_the_first_layers_are_dense_and_heads_have_a_size_of_their_own() -> None:
    model = describe_model(tiny_index("glm4_moe", first_k_dense_replace=2, head_dim=12))
    assert list(model.num_slots) == [2]
    assert model.mixers == (Attention(num_heads=4, num_kv_heads=2, head_dim=12),) * 3
    assert "model.layers.1.mlp.gate_proj.weight" in model.dense


def test_heads_are_normed_where_the_config_says_so() -> None:
    name = "model.layers.0.self_attn.k_norm.weight"
    assert describe_model(tiny_index("glm4_moe", use_qk_norm=True)).dense[name].shape == (8,)
    assert name not in describe_model(tiny_index("glm4_moe")).dense


def test_a_layer_that_predicts_more_is_done_without() -> None:
    predictor = an_entry("model.layers.3.enorm.weight", "BF16", 32)
    index = with_config(with_entries(tiny_index("glm4_moe"), predictor), num_nextn_predict_layers=1)
    assert describe_model(index).ignored == {"model.layers.3.enorm.weight"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("first_k_dense_replace", 5),
        ("n_group", 3),
        ("n_routed_experts", 8),
        ("n_shared_experts", 0),
        ("moe_intermediate_size", 32),
        ("use_qk_norm", "yes"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(tiny_index("glm4_moe"), **{key: value}))
    assert refused.value.field == f"config.json: {key}"
