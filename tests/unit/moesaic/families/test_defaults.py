"""Keys that a config leaves out, one by one, against the config classes and the modules of transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_families import SIZES, TINY, an_entry
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel, describe_model, nllb_moe, switch_transformers
from moesaic.families.defaults import DEFAULTS

# Sizes that every config states, and keys whose default transformers itself refuses beside the other values.
REQUIRED = {"vocab_size", "hidden_size", "num_hidden_layers", "d_model", "num_layers", "encoder_layers"}
REQUIRED |= {"decoder_layers", "model_type"}
REQUIRED_OF = {
    "deepseek_v2": {"num_experts_per_tok"},
    "dots1": {"num_experts_per_tok", "n_routed_experts", "n_shared_experts"},
    "flex_olmo": {"pad_token_id"},
    "hunyuan_v1_moe": {"head_dim"},
    "ministral": {"head_dim"},
    "nllb-moe": {"decoder_attention_heads", "encoder_attention_heads"},
}
SWITCH = {
    "d_model": 24, "d_kv": 8, "d_ff": 20, "num_heads": 3, "num_experts": 4, "num_layers": 4, "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12, "decoder_start_token_id": 0, "vocab_size": 64, "expert_capacity": 3,
    "layer_norm_epsilon": 1e-3, "pad_token_id": 2,
}  # fmt: skip
NLLB = {
    "d_model": 24, "max_position_embeddings": 64, "num_experts": 4, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_sparse_step": 2, "decoder_sparse_step": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 28, "vocab_size": 64, "moe_token_dropout": 0.3, "pad_token_id": 3,
    "second_expert_policy": "sampling", "moe_eval_capacity_token_fraction": -1.0, "expert_capacity": 5,
    "router_bias": True, "scale_embedding": False, "decoder_start_token_id": 5,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4}
CONFIGS: dict[str, Mapping[str, Any]] = {
    **{family: SIZES | config for family, config in TINY.items()},
    "llama": SIZES | {"attention_bias": True, "mlp_bias": True},
    "ministral": SIZES | {"head_dim": 8, "sliding_window": 5},
    "mistral": SIZES | {"sliding_window": 5},
    "mixtral": SIZES | EXPERTS | {"sliding_window": 5, "head_dim": 12},
    nllb_moe.FAMILY: NLLB,
    "phi": {key: value for key, value in SIZES.items() if key != "num_experts_per_tok"}
    | {"qk_layernorm": True},
    "phimoe": SIZES | EXPERTS | {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2},
    "qwen2_moe": SIZES
    | TINY["qwen2_moe"]
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "qkv_bias": False},
    "qwen3_moe": SIZES
    | TINY["qwen3_moe"]
    | {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": True},
    switch_transformers.FAMILY: SWITCH,
}


def class_default(family: str, key: str) -> Any:
    """The value of a key that transformers takes where a config has none; None where it has none either."""
    field = CONFIG_MAPPING[family].__dataclass_fields__.get(key)
    return None if field is None or field.default is MISSING else field.default


@cache
def complete(family: str) -> Mapping[str, Any]:
    """A config with a value for every key of its class, as transformers writes it."""
    config: dict[str, Any] = CONFIG_MAPPING[family](**CONFIGS[family]).to_dict()
    return {key: value for key, value in config.items() if value is not None}


def modules_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Without memory for any weight."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        modules: PreTrainedModel = kind.from_config(config)
    return modules


def index_of(modules: PreTrainedModel, config: Mapping[str, Any]) -> Checkpoint:
    entries = {
        name: an_entry(name, "F32", *tensor.shape)
        for name, tensor in modules.state_dict().items()
        if name not in modules.all_tied_weights_keys and "embed_positions" not in name
    }
    return Checkpoint(Path(), config, entries)


def dropped_keys(family: str) -> list[str]:
    return sorted(complete(family).keys() - REQUIRED - REQUIRED_OF.get(family, set()))


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_the_defaults_are_those_of_the_config_class(family: str) -> None:
    assert DEFAULTS[family] == {key: class_default(family, key) for key in DEFAULTS[family]}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_key_that_is_left_out_means_what_it_means_to_transformers(family: str) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for key in dropped_keys(family):
        values = {name: value for name, value in complete(family).items() if name != key}
        config = CONFIG_MAPPING[family].from_dict(values)
        modules = modules_of(config)
        explicit = {name: value for name, value in config.to_dict().items() if value is not None}
        expected = outcome(index_of(modules, explicit))
        assert outcome(index_of(modules, values)) == expected, key
        if isinstance(expected, MoeModel):
            assert set(expected.dense) <= set(modules.state_dict())


def outcome(checkpoint: Checkpoint) -> MoeModel | str:
    """The model that a config describes, or the key for which it is refused."""
    try:
        return describe_model(checkpoint, dense_layers="router")
    except CheckpointError as error:
        return str(error.field)


def test_every_family_of_transformers_has_its_defaults() -> None:
    assert DEFAULTS.keys() == CONFIGS.keys()


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mixtral", ["vocab_size", "hidden_size", "num_hidden_layers"]),
        ("switch_transformers", ["vocab_size", "d_model", "num_layers"]),
        ("nllb-moe", ["vocab_size", "d_model", "encoder_layers", "decoder_layers"]),
    ],
)
def test_the_sizes_that_every_config_states_are_asked_for(family: str, keys: list[str]) -> None:
    values = complete(family)
    modules = modules_of(CONFIG_MAPPING[family].from_dict(dict(values)))
    for missing in keys:
        with pytest.raises(CheckpointError, match=f"{missing}: is missing$"):
            describe_model(index_of(modules, {key: value for key, value in values.items() if key != missing}))
