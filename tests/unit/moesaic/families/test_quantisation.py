"""Weights in fewer bits: what is understood is read through its scales, all else is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support.tiny_families import an_entry, tiny_index, with_config, with_entries

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import describe_model

FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def in_float8(checkpoint: Checkpoint, scales: str = "F32") -> Checkpoint:
    """The same model with its projections in float8, as DeepSeek-V3 is published, and Qwen3 with other scales."""
    tensors = {}
    for name, entry in checkpoint.tensors.items():
        if name.endswith(("_proj.weight", "_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            blocks = tuple(math.ceil(size / 128) for size in entry.shape)
            tensors[name] = an_entry(name, "F8_E4M3", *entry.shape)
            tensors[name + "_scale_inv"] = an_entry(name + "_scale_inv", scales, *blocks)
        else:
            tensors[name] = an_entry(name, "BF16", *entry.shape)
    return with_config(replace(checkpoint, tensors=tensors), quantization_config=FLOAT8)


def refusal(checkpoint: Checkpoint) -> CheckpointError:
    with pytest.raises(CheckpointError) as refused:
        describe_model(checkpoint)
    return refused.value


@pytest.mark.parametrize("scales", ["F32", "BF16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "glm4_moe", "minimax_m2", "solar_open"])
def test_float8_is_read_through_its_scales_in_experts_and_elsewhere(family: str, scales: str) -> None:
    index = tiny_index(family)
    plain, encoded = describe_model(index), describe_model(in_float8(index, scales))
    assert encoded.num_parameters == plain.num_parameters
    assert {experts.dtype for experts in encoded.experts.values()} == {encoded.dtype} == {"bfloat16"}
    for pattern in encoded.experts[1].layout.values():
        assert (pattern.encoding, pattern.scales) == ("fp8_block", pattern.tensor + "_scale_inv")
    head = encoded.dense["lm_head.weight"]
    output = encoded.dense["model.layers.0.self_attn.o_proj.weight"]
    assert (head.scales, output.scales) == (None, output.source + "_scale_inv")


def test_a_dense_layer_in_float8_keeps_its_scales_wherever_it_is_computed() -> None:
    index = in_float8(tiny_index("deepseek_v3"))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert describe_model(index).dense[name].scales == name + "_scale_inv"
    experts = describe_model(index, dense_layers="experts").experts[0]
    assert experts.layout["gate"].encoding == "fp8_block"


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_what_a_release_left_unconverted_is_read_as_it_lies_in_the_files(key: str) -> None:
    """The files themselves say which modules these are."""
    index = in_float8(tiny_index("deepseek_v3"))
    left = ("model.layers.2.mlp.experts.", "model.layers.1.mlp.shared_experts.")
    names = [name for name in index.tensors if name.startswith(left)]
    tensors = {name: entry for name, entry in index.tensors.items() if name not in names}
    tensors |= {
        name: an_entry(name, "BF16", *index.tensors[name].shape)
        for name in names
        if not name.endswith("_scale_inv")
    }
    settings = {**FLOAT8, key: ["lm_head", *left]}
    model = describe_model(with_config(replace(index, tensors=tensors), quantization_config=settings))
    encodings = [{pattern.encoding for pattern in model.experts[i].layout.values()} for i in (1, 2)]
    assert encodings == [{"fp8_block"}, {"plain"}]
    assert model.dense["model.layers.1.mlp.shared_experts.up_proj.weight"].scales is None
    assert model.dense["model.layers.2.mlp.shared_experts.up_proj.weight"].scales is not None


def test_the_format_of_float8_has_two_spellings() -> None:
    index = in_float8(tiny_index("minimax_m2"))
    settings = {**FLOAT8, "fmt": "float8_e4m3fn"}
    assert describe_model(with_config(index, quantization_config=settings)) == describe_model(index)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2"])
def test_scales_of_a_tensor_that_has_none_are_refused_by_name(family: str) -> None:
    scales = an_entry("model.norm.weight_scale_inv", "F32", 1)
    assert refusal(with_entries(in_float8(tiny_index(family)), scales)).field == scales.name


def test_missing_scales_are_refused_by_name() -> None:
    index = in_float8(tiny_index("deepseek_v3"))
    name = EXPERT + "_scale_inv"
    tensors = {key: entry for key, entry in index.tensors.items() if key != name}
    assert refusal(replace(index, tensors=tensors)).field == name


def test_scales_of_other_blocks_are_refused_by_name() -> None:
    index = in_float8(tiny_index("deepseek_v3"))
    name = EXPERT + "_scale_inv"
    assert refusal(with_entries(index, an_entry(name, "F32", 2, 1))).field == name


def test_float8_that_the_config_does_not_tell_of_is_refused() -> None:
    index = with_config(in_float8(tiny_index("deepseek_v3")), "quantization_config")
    assert "F8_E4M3" in refusal(index).message


def test_experts_of_one_layer_may_not_be_partly_encoded() -> None:
    index = in_float8(tiny_index("deepseek_v3"))
    plain = an_entry(EXPERT, "BF16", 32, 16)
    assert refusal(with_entries(index, plain)).field == EXPERT


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config.quant_method"),
        ({"quant_method": "compressed-tensors"}, "quantization_config.quant_method"),
        ({}, "quantization_config.quant_method"),
        ({**FLOAT8, "fmt": "e5m2"}, "quantization_config.fmt"),
        ({**FLOAT8, "weight_block_size": [64, 128]}, "quantization_config.weight_block_size"),
        ({"quant_method": "fp8"}, "quantization_config.weight_block_size"),
        ("int8", "quantization_config"),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "solar_open"])
def test_what_is_not_understood_is_refused_by_name(family: str, config: object, key: str) -> None:
    index = with_config(tiny_index(family), quantization_config=config)
    assert refusal(index).field == f"config.json: {key}"
