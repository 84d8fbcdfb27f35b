"""Switch Transformers, ST-MoE and NLLB-MoE as data: whole, in the order of the wire, and refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.encoder_decoders import write_nllb, write_switch
from support.tiny_families import an_entry, with_config, with_entries
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import (
    Capacity,
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
    ExpertModule,
    GateRule,
)


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("switch")
    write_switch(folder, 0, num_layers=4, num_sparse_encoder_layers=2)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("nllb")
    write_nllb(folder, 0, decoder_layers=3)
    return open_checkpoint(folder)


def test_the_layers_of_the_encoder_come_first(switch: Checkpoint) -> None:
    model = describe_model(switch)
    assert (model.num_encoder_layers, model.num_layers) == (4, 6)
    assert model.num_slots == {1: 4, 3: 4, 5: 4}
    assert model.mixers == (
        *(EncoderAttention(3, 8),) * 4,
        *(DecoderAttention(3, 8),) * 2,
        *(CrossAttention(3, 8),) * 2,
    )
    layouts = {layer: experts.layout["up"].name(layer, 2) for layer, experts in model.experts.items()}
    assert layouts == {
        1: "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight",
        3: "encoder.block.3.layer.1.mlp.experts.expert_2.wi.weight",
        5: "decoder.block.1.layer.2.mlp.experts.expert_2.wi.weight",
    }


def test_both_sides_may_differ_and_nllb_has_biases(nllb: Checkpoint) -> None:
    model = describe_model(nllb, "experts")
    sizes = {"activation": "relu", "gated": False, "biased": True}
    assert model.experts[1].module == ExpertModule(24, 20, **sizes)  # type: ignore[arg-type]
    assert model.experts[2].module == ExpertModule(24, 28, **sizes)  # type: ignore[arg-type]
    assert model.num_slots == {0: 1, 1: 4, 2: 1, 3: 4, 4: 1}
    names = [model.experts[3].layout[weight].name(3, 1) for weight in model.experts[3].module.weights]
    prefix = "model.decoder.layers.1.ffn.experts.expert_1."
    assert names == [f"{prefix}{name}" for name in ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")]


@pytest.mark.parametrize("family", ["switch", "nllb"])
@pytest.mark.parametrize("dense_layers", ["router", "experts"])
def test_every_parameter_is_somebodys(request: pytest.FixtureRequest, family: str, dense_layers: Any) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(family)
    model = describe_model(checkpoint, dense_layers)
    stored = 0
    for file in {entry.file for entry in checkpoint.tensors.values()}:
        with safe_open(file, framework="pt") as tensors:
            stored += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert model.num_parameters == stored
    assert not model.dense.keys() & model.expert_tensors


def test_where_the_config_says_how_often_a_layer_is_sparse_that_counts(switch: Checkpoint) -> None:
    assert describe_model(with_config(switch, "encoder_sparse_step", "decoder_sparse_step")).num_slots == {
        1: 4,
        3: 4,
        5: 4,
    }


SWITCH_GATES: dict[str, tuple[dict[str, Any], GateRule, Capacity]] = {
    "switch": ({}, GateRule(1), Capacity("fixed", 64, counted="sequence")),
    "st_moe": (
        {"num_selected_experts": 2},
        GateRule(2, renormalise=True, epsilon=1e-9, second_threshold=0.2),
        Capacity("factor", 2.0, min_tokens=4, group_size=1024, count_kept_only=True),
    ),
    "st_moe in other words": (
        {
            "num_selected_experts": 2,
            "second_expert_policy": "threshold",
            "second_expert_threshold": 0.3,
            "eval_capacity_factor": 1.5,
            "min_expert_capacity": 2,
            "expert_group_size": 256,
        },
        GateRule(2, renormalise=True, epsilon=1e-9, second_threshold=0.3),
        Capacity("factor", 1.5, min_tokens=2, group_size=256, count_kept_only=True),
    ),
    "both always": (
        {"num_selected_experts": 2, "second_expert_policy": "all"},
        GateRule(2, renormalise=True, epsilon=1e-9),
        Capacity("factor", 2.0, min_tokens=4, group_size=1024, count_kept_only=True),
    ),
}


@pytest.mark.parametrize("name", SWITCH_GATES)
def test_the_gates_of_switch_and_of_st_moe_are_told_by_the_config(switch: Checkpoint, name: str) -> None:
    changes, gate, capacity = SWITCH_GATES[name]
    experts = describe_model(with_config(switch, **changes)).experts[1]
    assert (experts.gate, experts.capacity) == (gate, capacity)


NLLB_CAPACITIES: dict[str, tuple[dict[str, Any], Capacity]] = {
    "of all tokens": ({}, Capacity("fraction", 1.0, renormalise_first=False)),
    "of some": (
        {"moe_eval_capacity_token_fraction": 0.25},
        Capacity("fraction", 0.25, renormalise_first=False),
    ),
    "a number": ({"moe_eval_capacity_token_fraction": -1.0}, Capacity("fixed", 64, renormalise_first=False)),
    "the even share": (
        {"moe_eval_capacity_token_fraction": -1.0, "expert_capacity": None},
        Capacity("even", renormalise_first=False),
    ),
    "by score": (
        {"batch_prioritized_routing": True, "normalize_router_prob_before_dropping": True},
        Capacity("fraction", 1.0, batch_prioritised=True),
    ),
}


@pytest.mark.parametrize("name", NLLB_CAPACITIES)
def test_nllb_has_two_slots_a_token_and_a_capacity_of_its_own(nllb: Checkpoint, name: str) -> None:
    changes, capacity = NLLB_CAPACITIES[name]
    experts = describe_model(with_config(nllb, **changes)).experts[1]
    assert (experts.gate, experts.capacity) == (GateRule(2, renormalise=True, scale=0.8), capacity)


def test_copies_of_a_tied_embedding_are_not_read(switch: Checkpoint, nllb: Checkpoint) -> None:
    for checkpoint, names in (
        (switch, ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")),
        (nllb, ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")),
    ):
        described = describe_model(checkpoint)
        shared = checkpoint.tensors[described.ties[0]]
        copies = with_entries(checkpoint, *(replace(shared, name=name) for name in names))
        assert describe_model(copies).dense == described.dense


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("switch", "d_model", 25),
        ("switch", "vocab_size", 65),
        ("switch", "num_experts", 5),
        ("switch", "num_layers", 3),
        ("switch", "num_decoder_layers", 1),
        ("switch", "is_gated_act", True),
        ("switch", "dense_act_fn", "gated-gelu"),
        ("switch", "router_dtype", "bfloat16"),
        ("switch", "decoder_start_token_id", 64),
        ("switch", "num_selected_experts", 3),
        ("switch", "relative_attention_num_buckets", 6),
        ("switch", "relative_attention_max_distance", 4),
        ("nllb", "d_model", 36),
        ("nllb", "encoder_layers", 1),
        ("nllb", "encoder_attention_heads", 5),
        ("nllb", "num_experts", 1),
        ("nllb", "second_expert_policy", "random"),
        ("nllb", "moe_token_dropout", 1.0),
        ("nllb", "moe_eval_capacity_token_fraction", 2.0),
        ("nllb", "activation_function", "tanh"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_key(
    request: pytest.FixtureRequest, family: str, key: str, value: object
) -> None:
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(request.getfixturevalue(family), **{key: value}))
    assert refused.value.field == f"config.json: {key}"


def test_a_policy_that_nobody_knows_is_refused(switch: Checkpoint) -> None:
    changes = {"num_selected_experts": 2, "second_expert_policy": "sometimes"}
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(switch, **changes))
    assert refused.value.field == "config.json: second_expert_policy"


# NLLB-MoE's paper says 54.5 billion.
PUBLISHED: dict[str, tuple[type[PreTrainedModel], PretrainedConfig, int]] = {
    "nllb-moe-54b": (
        NllbMoeForConditionalGeneration,
        NllbMoeConfig(
            vocab_size=256206,
            d_model=2048,
            encoder_layers=24,
            decoder_layers=24,
            encoder_ffn_dim=8192,
            decoder_ffn_dim=8192,
            num_experts=128,
        ),
        54_500_569_088,
    ),
    "switch-base-8": (
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig(d_ff=3072, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6),
        619_339_008,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_sizes_has_its_place(switch: Checkpoint, name: str) -> None:
    build, config, num_parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = build(config)
    entries = {key: an_entry(key, "BF16", *tensor.shape) for key, tensor in model.named_parameters()}
    described = describe_model(replace(switch, config=config.to_dict(), tensors=entries))
    assert described.num_parameters == num_parameters
    assert sum(tensor.numel() for tensor in model.parameters()) == num_parameters
