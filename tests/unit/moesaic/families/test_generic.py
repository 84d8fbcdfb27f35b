"""Families without a module of their own: described by names and shapes, or refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from support.tiny_families import TINY, an_entry, tiny_index, with_config, with_entries
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moesaic.errors import CheckpointError
from moesaic.families import describe_model, generic
from moesaic.families.model import Attention, LatentAttention

# Families whose modules hand their experts to the interface of transformers, of which few are served.
WITH_EXPERTS = sorted(
    family
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if family in CONFIG_MAPPING
    and "@use_experts_implementation"
    in inspect.getsource(inspect.getmodule(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]))  # type: ignore[arg-type]
)


def refusal(index: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as refused:
        describe_model(index)
    return refused.value


@pytest.mark.parametrize("family", sorted(set(WITH_EXPERTS) - TINY.keys() - {"mixtral", "llama4"}))
def test_every_other_family_with_experts_is_refused_by_a_key_of_its_config(family: str) -> None:
    config = CONFIG_MAPPING[family]().to_dict()
    error = refusal(with_config(tiny_index("solar_open"), **config))
    assert error.field is not None and error.field.startswith("config.json: ")
    assert error.field.removeprefix("config.json: ") in config
    assert "not served" in error.message


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("qwen3_next", "layer_types"),
        ("minimax", "layer_types"),
        ("deepseek_v32", "layer_types"),
        ("jamba", "mamba_d_state"),
        ("nemotron_h", "mamba_num_heads"),
        ("lfm2_moe", "conv_L_cache"),
        ("qwen3_5_moe", "text_config"),
        ("mimo_v2_flash", "model_type"),
    ],
)
def test_the_key_says_why(family: str, key: str) -> None:
    config = CONFIG_MAPPING[family]().to_dict()
    assert refusal(with_config(tiny_index("solar_open"), **config)).field == f"config.json: {key}"


def test_a_family_that_nobody_knows_is_refused_with_those_that_are_served() -> None:
    error = refusal(with_config(tiny_index("solar_open"), model_type="nobody_moe"))
    assert error.field == "config.json: model_type"
    assert "'nobody_moe' is not served; supported: " in error.message and "solar_open" in error.message


def test_layers_have_windows_and_sinks_as_config_and_tensors_say() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = describe_model(tiny_index("granitemoe_swa", layer_types=kinds, sliding_window=8))
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "sinks": True}
    assert model.mixers == tuple(Attention(**heads, window=window) for window in (None, 8, None))


def test_latent_attention_is_that_of_deepseek() -> None:
    latent = LatentAttention(num_heads=4, latent_dim=12, rotary_dim=4, key_dim=8, value_dim=6)
    assert describe_model(tiny_index("glm4_moe_lite")).mixers == (latent,) * 3


def test_the_windows_of_a_family_are_where_its_rule_has_them() -> None:
    model = describe_model(with_config(tiny_index("exaone_moe", num_hidden_layers=6), "layer_types"))
    full = [
        layer for layer, mixer in enumerate(model.mixers) if isinstance(mixer, Attention) and not mixer.window
    ]
    assert full == [3]


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("solar_open", "num_attention_heads", 8),
        ("solar_open", "num_key_value_heads", 4),
        ("solar_open", "num_experts_per_tok", 0),
        ("ernie4_5_moe", "moe_k", None),
        ("hunyuan_v1_moe", "moe_topk", [2, 2]),
        ("hunyuan_v1_moe", "moe_topk", [2, 0, 2]),
        ("minimax_m2", "hidden_act", "gelu"),
        ("exaone_moe", "sliding_window", None),
        ("dots1", "index_topk", 16),
        ("glm4_moe_lite", "kv_lora_rank", 16),
        ("glm4_moe_lite", "qk_rope_head_dim", 6),
        ("solar_open", "num_hidden_layers", 2),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(family: str, key: str, value: object) -> None:
    index = with_config(tiny_index(family), **{key: value})
    assert refusal(index).field == f"config.json: {key}"


def test_a_family_may_say_of_each_layer_how_many_experts_a_token_has() -> None:
    experts = describe_model(with_config(tiny_index("hunyuan_v1_moe"), moe_topk=[1, 2, 3])).experts
    assert [experts[layer].top_k for layer in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("family", sorted(generic.NAMES))
def test_a_head_is_tied_where_the_config_does_not_say_as_transformers_has_it(family: str) -> None:
    silent = describe_model(with_config(tiny_index(family), "tie_word_embeddings"))
    assert silent.tied == CONFIG_MAPPING[family]().tie_word_embeddings


def test_more_experts_for_a_token_than_there_are_is_refused() -> None:
    error = refusal(with_config(tiny_index("solar_open"), num_experts_per_tok=5))
    assert error.field == "config.json: num_experts_per_tok" and "experts, 4" in error.message


def test_experts_that_are_not_as_many_as_the_config_says_are_refused_by_name() -> None:
    index = with_config(tiny_index("solar_open"), n_routed_experts=6)
    assert refusal(index).field == "model.layers.0.mlp.experts.4.gate_proj.weight"


def test_tensors_outside_of_the_decoder_are_refused_by_name() -> None:
    index = with_entries(tiny_index("mellum"), an_entry("mtp.fc.weight", "F32", 32, 64))
    assert refusal(index).field == "mtp.fc.weight"


def test_experts_of_no_known_layout_are_refused_by_the_tensor_that_was_looked_for() -> None:
    index = tiny_index("solar_open")
    tensors = {name: entry for name, entry in index.tensors.items() if ".experts." not in name}
    error = refusal(with_config(type(index)(index.folder, index.config, tensors)))
    assert "no known expert layout" in error.message


def test_an_expert_without_rows_is_refused_by_name() -> None:
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert refusal(with_entries(tiny_index("solar_open"), an_entry(name, "F32", 16))).field == name


def test_the_families_are_those_that_were_compared() -> None:
    assert TINY.keys() > generic.NAMES


def test_the_context_ends_where_longrope_would_change_the_positions_of_a_batch() -> None:
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert describe_model(with_config(tiny_index("minimax_m2"), rope_parameters=longrope)).max_model_len == 64
