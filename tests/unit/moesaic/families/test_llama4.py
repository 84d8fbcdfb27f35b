"""Llama-4: chunks, layers without rotary positions, and the text part of a folder that can see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_families import TINY, an_entry, tiny_index, with_config, with_entries
from transformers import Llama4Config, Llama4ForConditionalGeneration

from moesaic.checkpoints.checkpoint import Checkpoint, open_checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention, ExpertModule, GateRule, MoeModel, WeightPattern


def chunks(model: MoeModel) -> list[int | None]:
    return [mixer.chunk for mixer in model.mixers if isinstance(mixer, Attention)]


def seeing_index(text: Checkpoint) -> Checkpoint:
    """The model as a part of one that sees."""
    entries = [replace(entry, name=f"language_model.{name}") for name, entry in text.tensors.items()]
    vision = [
        an_entry("vision_model.class_embedding", "F32", 8),
        an_entry("multi_modal_projector.linear_1.weight", "F32", 32, 8),
    ]
    config = {"model_type": "llama4", "text_config": text.config, "vision_config": {}}
    return Checkpoint(text.folder, config, {entry.name: entry for entry in (*entries, *vision)})


def test_an_expert_is_asked_with_its_weight_applied() -> None:
    model = describe_model(tiny_index("llama4_text"))
    experts = model.experts[0]
    assert experts.gate == GateRule(1, score="logit", weight="sigmoid", weighs="input")
    assert experts.module == ExpertModule(32, 24, "silu")
    stored = "model.layers.{layer}.feed_forward.experts.gate_up_proj"
    assert experts.layout["up"] == WeightPattern(stored, True, (1, 2), transposed=True)
    assert model.dense["model.layers.0.feed_forward.shared_expert.up_proj.weight"].shape == (24, 32)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [16, 16, 16, None]),
        ({"no_rope_layer_interval": 2}, [16, None, 16, None]),
        ({"no_rope_layers": [1, 0, 0, 1]}, [16, None, None, 16]),
        ({"no_rope_layers": []}, [16, 16, 16, None]),
        ({"layer_types": ["full_attention", *["chunked_attention"] * 3]}, [None, 16, 16, 16]),
    ],
)
def test_layers_with_rotary_positions_see_their_chunk(
    rules: dict[str, Any], expected: list[int | None]
) -> None:
    index = tiny_index("llama4_text", num_hidden_layers=4, **rules)
    assert chunks(describe_model(index)) == expected
    if "layer_types" not in rules:
        # As published files have it.
        unlisted = with_config(index, "layer_types", "no_rope_layers", **rules)
        assert chunks(describe_model(unlisted)) == expected


@pytest.mark.parametrize(
    ("rules", "sparse"),
    [
        ({}, [0, 1, 2, 3]),
        ({"interleave_moe_layer_step": 2}, [1, 3]),
        ({"moe_layers": [0, 3]}, [0, 3]),
    ],
)
def test_the_config_says_which_layers_have_experts(rules: dict[str, Any], sparse: list[int]) -> None:
    index = tiny_index("llama4_text", num_hidden_layers=4, **rules)
    model = describe_model(index)
    assert list(model.num_slots) == sparse
    if "moe_layers" not in rules:
        assert describe_model(with_config(index, "moe_layers")) == model
    dense = describe_model(index, dense_layers="experts").experts
    assert all(dense[layer].module.inner_size == 40 for layer in range(4) if layer not in sparse)


def test_of_a_folder_that_sees_the_text_part_is_described() -> None:
    text = tiny_index("llama4_text", interleave_moe_layer_step=2)
    alone, part = describe_model(text), describe_model(seeing_index(text))
    assert (part.mixers, part.num_slots, part.num_parameters) == (
        alone.mixers,
        alone.num_slots,
        alone.num_parameters,
    )
    assert part.dense.keys() == alone.dense.keys()
    assert {tensor.source.split(".")[0] for tensor in part.dense.values()} == {"language_model"}
    assert part.ignored == {"vision_model.class_embedding", "multi_modal_projector.linear_1.weight"}


def test_what_transformers_writes_of_a_model_that_sees_is_described(tmp_path: Path) -> None:
    sizes = {**TINY["llama4_text"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16,
        "projector_output_dim": 16,
    }  # fmt: skip
    config = Llama4Config(text_config={**sizes, **heads, "pad_token_id": 0}, vision_config=vision)
    Llama4ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = describe_model(open_checkpoint(tmp_path))
    assert model.num_slots == {0: 4, 1: 4}
    assert model.ignored


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_chunk_size", 0),
        ("interleave_moe_layer_step", 9),
        ("intermediate_size", 12),
        ("intermediate_size_mlp", None),
        ("layer_types", ["sliding_attention"] * 3),
        ("moe_layers", [7]),
        ("num_experts_per_tok", 2),
        ("num_local_experts", 8),
    ],
)
@pytest.mark.parametrize("sees", [False, True])
def test_a_config_that_cannot_be_is_refused_by_its_key(key: str, value: object, sees: bool) -> None:
    removed = ("moe_layers",) if key == "interleave_moe_layer_step" else ()
    index = with_config(tiny_index("llama4_text"), *removed, **{key: value})
    with pytest.raises(CheckpointError) as refused:
        describe_model(seeing_index(index) if sees else index)
    where = "config.json: text_config" if sees else "config.json"
    expected = "moe_layers" if key == "interleave_moe_layer_step" else key
    assert refused.value.field == f"{where}: {expected}"


def test_a_short_list_of_layers_without_rotary_positions_is_refused() -> None:
    index = with_config(tiny_index("llama4_text"), "layer_types", no_rope_layers=[1])
    with pytest.raises(CheckpointError) as refused:
        describe_model(index)
    assert refused.value.field == "config.json: no_rope_layers"


def test_a_folder_without_a_text_part_is_refused() -> None:
    index = with_config(seeing_index(tiny_index("llama4_text")), text_config=None)
    with pytest.raises(CheckpointError) as refused:
        describe_model(index)
    assert refused.value.field == "config.json: text_config"


def test_tensors_of_a_third_part_are_refused() -> None:
    index = with_entries(seeing_index(tiny_index("llama4_text")), an_entry("audio.weight", "F32", 3))
    with pytest.raises(CheckpointError) as refused:
        describe_model(index)
    assert refused.value.field == "audio.weight"
