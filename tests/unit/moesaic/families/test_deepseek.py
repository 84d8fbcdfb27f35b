"""DeepSeek-V2 and DeepSeek-V3: latent attention, groups of experts, first dense layers, the layer that predicts more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.tiny_families import an_entry, tiny_index, with_config, with_entries

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import GateRule, Groups, LatentAttention

FAMILIES = ["deepseek_v2", "deepseek_v3"]


def refused_field(checkpoint: Checkpoint) -> str | None:
    with pytest.raises(CheckpointError) as refused:
        describe_model(checkpoint)
    return refused.value.field


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_come_from_one_vector_a_token(family: str) -> None:
    model = describe_model(tiny_index(family))
    latent = LatentAttention(num_heads=4, latent_dim=12, rotary_dim=4, key_dim=8, value_dim=6)
    assert model.mixers == (latent,) * 3
    assert model.dense["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (16, 32)
    assert model.dense["model.layers.0.self_attn.kv_b_proj.weight"].shape == (4 * (8 + 6), 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_compressed_or_not(family: str) -> None:
    compressed = describe_model(tiny_index(family)).dense
    plain = describe_model(tiny_index(family, q_lora_rank=None)).dense
    prefix = "model.layers.0.self_attn."
    assert compressed[prefix + "q_b_proj.weight"].shape == (4 * (8 + 4), 20)
    assert plain[prefix + "q_proj.weight"].shape == (4 * (8 + 4), 32)
    assert prefix + "q_a_proj.weight" not in plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 2])
def test_experts_begin_behind_the_dense_layers(family: str, first: int) -> None:
    index = tiny_index(family, first_k_dense_replace=first)
    model = describe_model(index)
    assert list(model.num_slots) == list(range(first, 3))
    assert model.dense["model.layers.2.mlp.shared_experts.up_proj.weight"].shape == (2 * 16, 32)
    served = describe_model(index, dense_layers="experts")
    assert list(served.num_slots.values()) == [1] * first + [8] * (3 - first)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({}, GateRule(2)),
        ({"routed_scaling_factor": 16.0}, GateRule(2, scale=16.0)),
        ({"topk_method": "greedy", "n_group": 4, "topk_group": 2}, GateRule(2)),
        (
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            GateRule(2, groups=Groups(4, 2, best=1)),
        ),
    ],
)
def test_v2_takes_the_groups_with_the_best_expert(config: dict[str, Any], rule: GateRule) -> None:
    model = describe_model(tiny_index("deepseek_v2", **config))
    assert {experts.gate for experts in model.experts.values()} == {rule}


def test_v3_chooses_by_a_bias_that_no_weight_has() -> None:
    model = describe_model(tiny_index("deepseek_v3", n_group=4, topk_group=2, norm_topk_prob=False))
    rule = GateRule(
        2,
        score="sigmoid",
        selection_bias=True,
        groups=Groups(4, 2, best=2),
        epsilon=1e-20,
        scale=2.5,
    )
    assert {experts.gate for experts in model.experts.values()} == {rule}
    assert model.dense["model.layers.1.mlp.gate.e_score_correction_bias"].shape == (8,)
    grouped_as_one = describe_model(tiny_index("deepseek_v3", n_group=1)).experts[1].gate
    assert grouped_as_one is not None and grouped_as_one.groups is None


def test_what_a_config_of_v3_leaves_out_is_what_transformers_takes_for_it() -> None:
    index = tiny_index("deepseek_v3", n_routed_experts=16, n_group=8, topk_group=4)
    silent = with_config(index, "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
    assert describe_model(silent) == describe_model(index)


@pytest.mark.parametrize("spelling", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_a_layer_that_predicts_more_is_done_without(spelling: str) -> None:
    index = with_config(tiny_index("deepseek_v3"), "num_nextn_predict_layers", "num_mtp_layers")
    predictor = an_entry("model.layers.3.eh_proj.weight", "BF16", 32, 64)
    assert refused_field(with_entries(index, predictor)) == "config.json: num_hidden_layers"
    model = describe_model(with_config(with_entries(index, predictor), **{spelling: 1}))
    assert model.ignored == {"model.layers.3.eh_proj.weight"}
    assert replace(model, ignored=frozenset()) == describe_model(index)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        *((family, key, value) for family in FAMILIES for key, value in (
            ("first_k_dense_replace", 3),
            ("kv_lora_rank", None),
            ("moe_intermediate_size", 12),
            ("moe_layer_freq", 2),
            ("n_routed_experts", 6),
            ("n_shared_experts", 0),
            ("num_experts_per_tok", 9),
            ("qk_rope_head_dim", 0),
            ("routed_scaling_factor", 0),
        )),
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "mlp_bias", True),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "n_group", 3),
        ("deepseek_v3", "n_group", 8),
        ("deepseek_v3", "topk_group", 3),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused_by_its_key(family: str, key: str, value: object) -> None:
    index = with_config(tiny_index(family), **{key: value})
    assert refused_field(index) == f"config.json: {key}"


def test_groups_that_keep_too_few_experts_are_refused() -> None:
    index = with_config(tiny_index("deepseek_v3", n_group=4, topk_group=2), num_experts_per_tok=5)
    assert refused_field(index) == "config.json: topk_group"


def test_a_rank_of_queries_that_the_tensors_do_not_have_is_refused_by_their_name() -> None:
    index = with_config(tiny_index("deepseek_v3"), q_lora_rank=None)
    assert refused_field(index) == "model.layers.0.self_attn.q_proj.weight"
