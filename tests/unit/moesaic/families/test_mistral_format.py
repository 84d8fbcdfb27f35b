"""Mistral's own releases are described so that the very bits of the Hugging Face form come out of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY_MIXTRAL
from support.described_tensors import read_described
from support.mistral_checkpoints import mistral_tensors, randomise, write_mistral_format
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moesaic.checkpoints.checkpoint import MISTRAL_SINGLE_FILE, Checkpoint, open_checkpoint
from moesaic.checkpoints.mistral_params import PARAMS_FILE, read_params
from moesaic.checkpoints.safetensors_file import TensorEntry
from moesaic.errors import CheckpointError
from moesaic.families import describe_model
from moesaic.families.model import Attention

TINY_MISTRAL = {key: value for key, value in TINY_MIXTRAL.items() if "expert" not in key}


def mixtral(**overrides: Any) -> PreTrainedModel:
    return randomise(MixtralForCausalLM(MixtralConfig(**TINY_MIXTRAL | overrides)))


def mistral(**overrides: Any) -> PreTrainedModel:
    return randomise(MistralForCausalLM(MistralConfig(**TINY_MISTRAL | overrides)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_mistral_format(tmp_path / "native", mixtral(), "safetensors")


def bits(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return read_described(checkpoint, describe_model(checkpoint))


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        describe_model(open_checkpoint(folder))
    return caught.value


def edit_params(folder: Path, **changes: Any) -> None:
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps(params))


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(folder / MISTRAL_SINGLE_FILE), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / MISTRAL_SINGLE_FILE)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 20},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 2},
        {"sliding_window": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [mixtral, mistral])
def test_the_very_bits_of_the_hugging_face_form_come_out(tmp_path: Path, build: Any, overrides: Any) -> None:
    model = build(**overrides)
    model.save_pretrained(tmp_path / "hf")
    write_mistral_format(tmp_path / "native", model, "safetensors")
    assert equal(bits(tmp_path / "hf"), bits(tmp_path / "native"))


def test_both_forms_are_the_same_model_but_for_names(tmp_path: Path) -> None:
    model = mixtral(sliding_window=9)
    model.save_pretrained(tmp_path / "hf")
    write_mistral_format(tmp_path / "native", model, "safetensors", max_seq_len=256)
    ours, theirs = (describe_model(open_checkpoint(tmp_path / form)) for form in ("hf", "native"))
    assert (ours.family, ours.mixers, ours.max_model_len, ours.addresses, ours.num_parameters) == (
        theirs.family,
        theirs.mixers,
        theirs.max_model_len,
        theirs.addresses,
        theirs.num_parameters,
    )
    assert ours.experts[0].gate == theirs.experts[0].gate
    assert ours.experts[0].module == theirs.experts[0].module


def test_queries_and_keys_are_put_in_order_by_their_own_number_of_heads(folder: Path) -> None:
    dense = describe_model(open_checkpoint(folder)).dense
    prefix = "model.layers.1.self_attn."
    assert dense[prefix + "q_proj.weight"].rotary_heads == 4
    assert dense[prefix + "k_proj.weight"].rotary_heads == 2
    rotated = {name for name, tensor in dense.items() if tensor.rotary_heads is not None}
    assert {name.split(".")[-2] for name in rotated} == {"q_proj", "k_proj"}


def test_a_dense_layer_goes_to_the_router_under_the_names_of_transformers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_mistral_format(tmp_path, mistral(), "safetensors"))
    model = describe_model(checkpoint, "router")
    assert model.experts == {}
    gate = model.dense["model.layers.1.mlp.gate_proj.weight"]
    assert (gate.source, gate.shape) == ("layers.1.feed_forward.w1.weight", (24, 32))


def test_windows_that_differ_by_layer_are_those_of_the_mixers(tmp_path: Path) -> None:
    folder = write_mistral_format(tmp_path, mistral(), "safetensors", sliding_window=[None, 16])
    model = describe_model(open_checkpoint(folder))
    assert [mixer.window for mixer in model.mixers if isinstance(mixer, Attention)] == [None, 16]


@pytest.mark.parametrize(
    ("key", "value"),
    [("dim", 40), ("hidden_dim", 40), ("vocab_size", 97), ("n_layers", 1), ("n_kv_heads", 3)],
)
def test_params_that_do_not_match_are_refused_in_their_own_spelling(
    folder: Path, key: str, value: int
) -> None:
    edit_params(folder, **{key: value})
    assert refusal(folder).field == f"params.json: {key}"


@pytest.mark.parametrize(
    ("moe", "field"),
    [
        ({"num_experts": 3, "num_experts_per_tok": 2}, "moe.num_experts"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "moe.num_experts_per_tok"),
    ],
)
def test_experts_that_do_not_match_are_refused_in_their_own_spelling(
    folder: Path, moe: dict[str, int], field: str
) -> None:
    edit_params(folder, moe=moe)
    assert refusal(folder).field == f"params.json: {field}"


@pytest.mark.parametrize(
    "name", ["output.weight", "layers.1.attention.wk.weight", "layers.0.feed_forward.gate.weight",
             "layers.1.feed_forward.experts.2.w2.weight"],
)  # fmt: skip
def test_a_missing_tensor_is_named_as_the_file_names_it(folder: Path, name: str) -> None:
    edit_tensors(folder, {name: None})
    error = refusal(folder)
    assert error.field == name
    assert "params.json" in error.message


def test_a_tensor_that_is_no_part_of_the_model_is_named(folder: Path) -> None:
    edit_tensors(folder, {"vision_encoder.ln_pre.weight": torch.zeros(4)})
    assert refusal(folder).field == "vision_encoder.ln_pre.weight"


def test_experts_in_params_of_a_dense_model_are_refused(tmp_path: Path) -> None:
    folder = write_mistral_format(tmp_path, mistral(), "safetensors")
    edit_params(folder, moe={"num_experts": 4, "num_experts_per_tok": 2})
    assert refusal(folder).field == "layers.0.feed_forward.experts.0.w1.weight"


@pytest.mark.shared
@pytest.mark.parametrize("native", ["hf_v5_fused", "mistral_native"])
def test_the_reference_mixtral_has_the_same_bits_in_every_form(shared: Path, native: str) -> None:
    goldens = shared / "goldens" / "mixtral"
    assert equal(bits(goldens / "hf_v4"), bits(goldens / native))


@pytest.mark.shared
def test_the_reference_mistral_has_the_same_bits_in_either_form(shared: Path) -> None:
    goldens = shared / "goldens" / "mistral-sliding-window"
    assert equal(bits(goldens / "hf_v4"), bits(goldens / "mistral_native"))
    config = open_checkpoint(goldens / "mistral_native").config
    assert (config["sliding_window"], config["rope_theta"], config["head_dim"]) == (8, 1e4, 20)


def test_the_test_writes_what_the_files_of_mistral_have() -> None:
    names = mistral_tensors(mixtral()).keys()
    assert {name for name in names if "layers.0." in name and "experts" not in name} == {
        *(f"layers.0.attention.w{letter}.weight" for letter in "qkvo"),
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "layers.0.feed_forward.gate.weight",
    }


# The published sizes of Mixtral 8x7B and Mistral 7B v0.1.
WIDTH, INNER, KEYS, NUM_LAYERS, NUM_SLOTS, VOCABULARY = 4096, 14336, 1024, 32, 8, 32000
COMMON = {
    "tok_embeddings.weight": (VOCABULARY, WIDTH),
    "norm.weight": (WIDTH,),
    "output.weight": (VOCABULARY, WIDTH),
}
LAYER = {
    "attention.wq.weight": (WIDTH, WIDTH),
    "attention.wk.weight": (KEYS, WIDTH),
    "attention.wv.weight": (KEYS, WIDTH),
    "attention.wo.weight": (WIDTH, WIDTH),
    "attention_norm.weight": (WIDTH,),
    "ffn_norm.weight": (WIDTH,),
}
MLP = {"w1.weight": (INNER, WIDTH), "w2.weight": (WIDTH, INNER), "w3.weight": (INNER, WIDTH)}
DENSE = {f"feed_forward.{name}": shape for name, shape in MLP.items()}
EXPERTS = {
    "feed_forward.gate.weight": (NUM_SLOTS, WIDTH),
    **{
        f"feed_forward.experts.{slot}.{name}": shape
        for slot in range(NUM_SLOTS)
        for name, shape in MLP.items()
    },
}
# The first upload, each tensor [E * F, D] taken for [E, F, D].
STACKED = {
    "block_sparse_moe.gate.weight": (NUM_SLOTS, WIDTH),
    **{f"block_sparse_moe.w{number}": (NUM_SLOTS, INNER, WIDTH) for number in (1, 2, 3)},
}
PARAMS = {
    "dim": WIDTH, "n_layers": NUM_LAYERS, "head_dim": 128, "hidden_dim": INNER, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": VOCABULARY,
}  # fmt: skip
MOE = {"moe": {"num_experts": NUM_SLOTS, "num_experts_per_tok": 2}}


@pytest.mark.parametrize(
    ("params", "ffn", "total", "active"),
    [
        ({"sliding_window": 4096}, DENSE, 7_241_732_096, 7_241_732_096),
        (MOE, EXPERTS, 46_702_792_704, 12_879_925_248),
        (MOE, STACKED, 46_702_792_704, 12_879_925_248),
    ],
    ids=["Mistral 7B v0.1", "Mixtral 8x7B, torrent", "Mixtral 8x7B, stacked"],
)
def test_the_published_models_have_the_published_number_of_parameters(
    params: dict[str, Any], ffn: dict[str, tuple[int, ...]], total: int, active: int
) -> None:
    shapes = COMMON | {
        f"layers.{layer}.{name}": shape
        for layer in range(NUM_LAYERS)
        for name, shape in {**LAYER, **ffn}.items()
    }
    entries = {
        name: TensorEntry(name, Path(MISTRAL_SINGLE_FILE), "BF16", shape, 0, 2 * math.prod(shape))
        for name, shape in shapes.items()
    }
    config = read_params(PARAMS | params)
    checkpoint = Checkpoint(Path(), config.values, entries, PARAMS_FILE, config.spelling)
    model = describe_model(checkpoint)
    assert (model.num_parameters, model.num_active_parameters) == (total, active)
    # 86.99 GiB of weights, where there are 8 experts.
    assert sum(entry.num_bytes for entry in entries.values()) == 2 * total
