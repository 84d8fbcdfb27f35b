"""gpt-oss: windows and sinks, and its experts as floats or as mxfp4."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.tiny_families import an_entry, tiny_index, with_config

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention, ExpertModule, GateRule, WeightPattern

EXPERTS = "model.layers.{layer}.mlp.experts."
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def in_mxfp4(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with its experts as published: output rows, and 32 inputs in 16 bytes."""
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            num_slots, inputs, outputs = tensors.pop(name).shape
            groups = (num_slots, outputs, inputs // 32)
            tensors[name + "_blocks"] = an_entry(name + "_blocks", "U8", *groups, 16)
            tensors[name + "_scales"] = an_entry(name + "_scales", "U8", *groups)
        else:
            tensors[name] = an_entry(name, "BF16", *entry.shape)
    encoded = replace(checkpoint, tensors=tensors)
    return with_config(encoded, quantization_config={"quant_method": "mxfp4"})


def test_every_second_layer_has_the_window_and_all_have_sinks() -> None:
    index = tiny_index("gpt_oss")
    heads = Attention(num_heads=4, num_kv_heads=2, head_dim=8, sinks=True)
    mixers = (replace(heads, window=8), heads, replace(heads, window=8))
    assert describe_model(index).mixers == mixers
    assert describe_model(with_config(index, "layer_types")).mixers == mixers
    full = with_config(index, layer_types=["full_attention"] * 3, sliding_window=None)
    assert describe_model(full).mixers == (heads,) * 3


def test_gate_and_up_take_turns_in_the_columns_of_one_tensor() -> None:
    experts = describe_model(tiny_index("gpt_oss")).experts[0]
    assert experts.gate == GateRule(2, score="logit", weight="softmax", biased=True)
    assert experts.module == ExpertModule(32, 24, "clamped_swiglu", biased=True, limit=7.0)
    up = WeightPattern(EXPERTS + "gate_up_proj", True, (1, 2), interleaved=True, transposed=True)
    assert experts.layout["up"] == up
    bias = WeightPattern(EXPERTS + "gate_up_proj_bias", True, (1, 2), interleaved=True)
    assert experts.layout["up_bias"] == bias


def test_published_experts_are_mxfp4_with_output_rows() -> None:
    plain = describe_model(tiny_index("gpt_oss", **SIZES))
    encoded = describe_model(in_mxfp4(tiny_index("gpt_oss", **SIZES)))
    assert encoded.num_parameters == plain.num_parameters
    assert encoded.experts[0].dtype == encoded.dtype == "bfloat16"
    assert encoded.experts[0].layout["gate"] == WeightPattern(
        EXPERTS + "gate_up_proj_blocks",
        True,
        (0, 2),
        interleaved=True,
        encoding="mxfp4",
        scales=EXPERTS + "gate_up_proj_scales",
    )
    assert encoded.experts[0].layout["down_bias"].encoding == "plain"


def test_blocks_of_other_shapes_are_refused_by_name() -> None:
    encoded = in_mxfp4(tiny_index("gpt_oss", **SIZES))
    name = "model.layers.1.mlp.experts.down_proj_scales"
    entry = an_entry(name, "U8", 4, 64, 2)
    with pytest.raises(CheckpointError) as refused:
        describe_model(replace(encoded, tensors={**encoded.tensors, name: entry}))
    assert refused.value.field == name


def test_rows_that_do_not_go_into_groups_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="groups of 32") as refused:
        describe_model(in_mxfp4(tiny_index("gpt_oss", hidden_size=40, intermediate_size=96)))
    assert refused.value.field == "model.layers.0.mlp.experts.gate_up_proj_blocks"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("swiglu_alpha", 1.5),
        ("swiglu_limit", -1),
        ("intermediate_size", 32),
        ("num_local_experts", 8),
        ("layer_types", ["chunked_attention"] * 3),
        ("sliding_window", 0),
        ("hidden_act", "gelu"),
    ],
)
@pytest.mark.parametrize("encoded", [False, True])
def test_a_config_that_cannot_be_is_refused_by_its_key(key: str, value: object, encoded: bool) -> None:
    index = tiny_index("gpt_oss", **SIZES)
    with pytest.raises(CheckpointError) as refused:
        describe_model(with_config(in_mxfp4(index) if encoded else index, **{key: value}))
    assert refused.value.field == f"config.json: {key}"


def test_the_slope_of_the_activation_may_be_left_out() -> None:
    index = tiny_index("gpt_oss")
    assert describe_model(with_config(index, "swiglu_alpha", "swiglu_limit")) == describe_model(index)
