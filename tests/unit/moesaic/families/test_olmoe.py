"""OLMoE and FlexOlmo: norms over all heads at once, before the blocks or after them."""

from __future__ import annotations

import pytest
from support.tiny_families import tiny_index, with_config

from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import GateRule


@pytest.mark.parametrize("family", ["olmoe", "flex_olmo"])
def test_queries_and_keys_are_normed_over_all_their_heads(family: str) -> None:
    model = describe_model(tiny_index(family, num_attention_heads=4, num_key_value_heads=2))
    assert model.dense["model.layers.0.self_attn.q_norm.weight"].shape == (32,)
    assert model.dense["model.layers.0.self_attn.k_norm.weight"].shape == (16,)


def test_a_flex_olmo_norms_what_its_blocks_answer() -> None:
    olmoe, flex_olmo = (describe_model(tiny_index(family)).dense for family in ("olmoe", "flex_olmo"))
    before, after = (
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_feedforward_layernorm.weight",
    )
    assert before in olmoe and after not in olmoe
    assert after in flex_olmo and before not in flex_olmo


@pytest.mark.parametrize("family", ["olmoe", "flex_olmo"])
@pytest.mark.parametrize("normed", [False, True])
def test_weights_sum_to_one_only_where_the_config_says_so(family: str, normed: bool) -> None:
    model = describe_model(tiny_index(family, norm_topk_prob=normed))
    assert model.experts[0].gate == GateRule(2, renormalise=normed)


@pytest.mark.parametrize("family", ["olmoe", "flex_olmo"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("intermediate_size", 16),
        ("num_experts", 6),
        ("num_experts_per_tok", 0),
        ("num_hidden_layers", 1),
        ("hidden_act", "relu"),
        ("attention_bias", None),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(family: str, key: str, value: object) -> None:
    changed = with_config(tiny_index(family), **{key: value})
    if value is None:
        # The same as if it were missing.
        assert describe_model(changed) == describe_model(tiny_index(family))
        return
    with pytest.raises(CheckpointError) as refused:
        describe_model(changed)
    assert refused.value.field == f"config.json: {key}"
