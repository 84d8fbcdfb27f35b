"""params.json of Mistral's releases as a config: every spelling there has been, and a name for whatever is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic.checkpoints.mistral_params import CONTEXT_LENGTH, read_params
from moesaic.errors import CheckpointError

# As published with Mistral 7B v0.1 and Mixtral 8x7B.
MISTRAL: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}  # fmt: skip
STACKED: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "vocab_size": 32000,
}  # fmt: skip


def values(params: dict[str, Any], *without: str, **changes: Any) -> dict[str, Any]:
    given = {key: value for key, value in params.items() if key not in without}
    return dict(read_params(given | changes).values)


def refusal(params: dict[str, Any], *without: str, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        values(params, *without, **changes)
    assert caught.value.field is not None
    return caught.value.field


def test_a_dense_model_is_a_mistral_with_nothing_left_to_defaults() -> None:
    assert values(MISTRAL) == {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    }


def test_a_model_with_experts_is_a_mixtral() -> None:
    config = values(MIXTRAL)
    assert (config["model_type"], config["architectures"]) == ("mixtral", ["MixtralForCausalLM"])
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["sliding_window"] is None and config["rope_theta"] == 1e6


def test_the_keys_of_the_stacked_files_say_the_same_as_those_of_the_torrent() -> None:
    assert values(STACKED) == values(MIXTRAL)


def test_the_stacked_files_may_name_the_experts_of_a_token() -> None:
    assert values(STACKED, num_experts_per_tok=3)["num_experts_per_tok"] == 3


@pytest.mark.parametrize("null", ["moe", "lora", "vision_encoder", "sliding_window", "rope_theta"])
def test_a_null_says_as_much_as_a_missing_key(null: str) -> None:
    assert values(MISTRAL, **{null: None}) == values(MISTRAL, null)


def test_what_has_no_part_in_a_forward_pass_is_passed_over() -> None:
    changes = {"max_batch_size": 4, "model_type": "transformer", "causal": True, "use_biases": False}
    assert values(MISTRAL, **changes) == values(MISTRAL)


def test_the_context_is_that_of_the_file_where_it_names_one() -> None:
    assert values(MIXTRAL)["max_position_embeddings"] == CONTEXT_LENGTH
    assert values(MIXTRAL, max_position_embeddings=131072)["max_position_embeddings"] == 131072
    assert values(MIXTRAL, max_seq_len=8192)["max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_theta": 10000}, 1e4),
        # Where no theta is given, the first loader took the short one for a window and the long one without.
        ({"sliding_window": 4096}, 1e4),
        ({"sliding_window": "4096"}, 1e4),
        ({"sliding_window": None}, 1e6),
        # Keys that came later, read by a loader that always took the long one.
        ({"sliding_window": [4096]}, 1e6),
        ({"sliding_window": None, "_sliding_window": 4096}, 1e6),
    ],
)
def test_a_missing_theta_follows_from_the_age_of_the_file(changes: dict[str, Any], theta: float) -> None:
    assert values(MISTRAL, **changes)["rope_theta"] == theta


@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
@pytest.mark.parametrize("window", [512, "512", [512], [512, 512]])
def test_one_window_has_many_spellings(key: str, window: object) -> None:
    config = values(MISTRAL, "sliding_window", **{key: window})
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 512)


def test_windows_that_differ_by_layer_repeat_and_become_layer_types() -> None:
    config = values(MISTRAL, "sliding_window", _sliding_window=[None, 512, 512, 512])
    assert (config["model_type"], config["architectures"]) == ("ministral", ["MinistralForCausalLM"])
    assert config["sliding_window"] == 512
    assert config["layer_types"] == (["full_attention"] + ["sliding_attention"] * 3) * 8


def test_a_window_as_long_as_the_context_is_none() -> None:
    config = values(MISTRAL, "sliding_window", _sliding_window=[131072, 512], max_position_embeddings=131072)
    assert config["layer_types"][:2] == ["full_attention", "sliding_attention"]
    assert values(MISTRAL, sliding_window=[CONTEXT_LENGTH])["sliding_window"] is None


@pytest.mark.parametrize(
    "window", [0, -1, 1.5, True, "", "-4", "4k", [], [512] * 3, [512, 256], [0], {"a": 1}], ids=str
)
def test_a_window_that_says_nothing_is_refused(window: object) -> None:
    assert refusal(MISTRAL, sliding_window=window) == "params.json: sliding_window"


def test_two_windows_are_refused() -> None:
    assert refusal(MISTRAL, _sliding_window=4096) == "params.json: _sliding_window"


def test_experts_with_windows_that_differ_by_layer_are_refused() -> None:
    assert refusal(MIXTRAL, sliding_window=[None, 512]) == "params.json: sliding_window"


def test_the_head_follows_from_the_width_where_it_is_not_named() -> None:
    assert values(MISTRAL, "head_dim")["head_dim"] == 128
    assert refusal(MISTRAL, "head_dim", n_heads=30) == "params.json: n_heads"


@pytest.mark.parametrize("key", sorted(MISTRAL.keys() - {"sliding_window", "head_dim"}))
def test_a_missing_key_is_named_as_the_file_spells_it(key: str) -> None:
    assert refusal(MISTRAL, key) == f"params.json: {key}"


@pytest.mark.parametrize("key", sorted(STACKED.keys() - {"rope_theta", "num_local_experts"}))
def test_a_missing_key_of_the_stacked_files_is_named(key: str) -> None:
    params = {name: value for name, value in STACKED.items() if name != key}
    with pytest.raises(CheckpointError, match=r"params\.json: .* is missing"):
        read_params(params)


@pytest.mark.parametrize(
    ("moe", "field"),
    [
        ({}, "moe.num_experts"),
        ({"num_experts": 8}, "moe.num_experts_per_tok"),
        ({"num_experts_per_tok": 2}, "moe.num_experts"),
        ({"num_experts": 0, "num_experts_per_tok": 2}, "moe.num_experts"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "num_shared": 1}, "moe.num_shared"),
        ([8, 2], "moe"),
    ],
    ids=str,
)
def test_an_incomplete_description_of_experts_is_refused(moe: object, field: str) -> None:
    assert refusal(MIXTRAL, moe=moe) == f"params.json: {field}"


@pytest.mark.parametrize("value", [0, -1, 1.0, "4096", True, [1]])
def test_a_size_that_is_none_is_refused(value: object) -> None:
    assert refusal(MISTRAL, dim=value) == "params.json: dim"


def test_more_layers_than_any_model_has_are_refused() -> None:
    assert refusal(MISTRAL, n_layers=10**9, sliding_window=[None, 512]) == "params.json: n_layers"


@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", True, float("inf"), float("nan"), 10**400])
def test_a_number_that_is_none_is_refused(value: object) -> None:
    assert refusal(MISTRAL, norm_eps=value) == "params.json: norm_eps"
    assert refusal(MISTRAL, rope_theta=value) == "params.json: rope_theta"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_encoder", {"hidden_size": 1024}),
        ("lora", {"rank": 64}),
        ("model_type", "mamba"),
        ("use_biases", True),
        ("causal", False),
        ("quantization", {"qformat_weight": "fp8_e4m3"}),
        ("yarn", {"factor": 8}),
        ("tied_embeddings", "no"),
    ],
)
def test_what_might_change_the_arithmetic_is_refused_by_name(key: str, value: object) -> None:
    assert refusal(MISTRAL, **{key: value}) == f"params.json: {key}"


def test_complaints_about_the_config_can_be_told_in_the_spelling_of_the_file() -> None:
    assert read_params(MIXTRAL).spelling["num_local_experts"] == "moe.num_experts"
    assert read_params(STACKED).spelling["num_local_experts"] == "num_local_experts"
    assert read_params(MISTRAL).spelling["hidden_size"] == "dim"
