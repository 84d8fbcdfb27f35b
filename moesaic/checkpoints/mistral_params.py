"""Translates params.json, the config of Mistral's own releases, to a Hugging Face config.

All readers of a checkpoint see an ordinary config. Nothing in it is left to defaults, as those of transformers differ from
what these files mean. Errors name the key as params.json spells it. A key that is not known here is refused, as it may
change the arithmetic.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from moesaic.errors import CheckpointError

PARAMS_FILE = "params.json"
# The context of all these models, if the file does not state it.
CONTEXT_LENGTH = 32768
# No model has more layers. The bound exists because descriptions list every layer.
MAX_LAYERS = 1 << 10
# JSON may contain whole numbers that are larger than any float.
MAX_FLOAT = sys.float_info.max

# The keys of the config, and the names that releases have for them. The second spelling is that of the eight stacked
# files.
_SIZES = {
    "hidden_size": ("dim", "hidden_size"),
    "intermediate_size": ("hidden_dim", "intermediate_size"),
    "num_hidden_layers": ("n_layers", "num_hidden_layers"),
    "num_attention_heads": ("n_heads", "num_attention_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len"),
    "num_local_experts": ("moe.num_experts", "num_local_experts"),
    "num_experts_per_tok": ("moe.num_experts_per_tok", "num_experts_per_tok"),
}
_NUMBERS = {"rms_norm_eps": ("norm_eps", "rms_norm_eps"), "rope_theta": ("rope_theta",)}
_WINDOW = ("sliding_window", "_sliding_window")
_TIED = "tied_embeddings"
# Keys with the only values that they may have.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("transformer",),
    "causal": (True,),
    "use_biases": (False,),
}
# Keys without a meaning for the forward pass.
_HARMLESS = frozenset({"max_batch_size"})
_KNOWN = _HARMLESS | _FIXED.keys() | {_TIED, *_WINDOW}.union(*_SIZES.values(), *_NUMBERS.values())

Window = int | None


@dataclass(frozen=True, slots=True)
class ParamsConfig:
    """A translated config. `spelling` maps the keys of `values` to those of params.json."""

    values: Mapping[str, Any]
    spelling: Mapping[str, str]


def read_params(params: Mapping[str, Any]) -> ParamsConfig:
    """The config of a dense or a sparse decoder. Raises CheckpointError, which names the key."""
    given = _flatten(params)
    for key in given:
        _check_known(key, given[key])
    spelling = {
        key: next((name for name in names if name in given), names[0])
        for key, names in (_SIZES | _NUMBERS).items()
    }
    sizes = {key: _read_size(given, spelling[key]) for key in _SIZES if spelling[key] in given}
    sizes.setdefault("max_position_embeddings", CONTEXT_LENGTH)
    if spelling["num_local_experts"] == "num_local_experts":
        # This default applies to the stacked files alone.
        sizes.setdefault("num_experts_per_tok", 2)
    sparse = spelling["num_local_experts"] in given or params.get("moe") is not None
    _complete(sizes, spelling, sparse=sparse)
    values = {
        "architectures": ["MixtralForCausalLM" if sparse else "MistralForCausalLM"],
        "model_type": "mixtral" if sparse else "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        **sizes,
        "rms_norm_eps": _read_number(given, spelling["rms_norm_eps"]),
        "rope_theta": _read_theta(given),
        "tie_word_embeddings": _read_tied(given),
    }
    return ParamsConfig(values | _read_windows(given, sizes, sparse=sparse), spelling)


def _fail(key: str, problem: str) -> NoReturn:
    field = f"{PARAMS_FILE}: {key}"
    raise CheckpointError(f"{field}: {problem}", field=field)


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """The values without nulls, which mean the same as a missing key; those of `moe` get the prefix `moe.`."""
    given = {key: value for key, value in params.items() if value is not None}
    moe = given.pop("moe", {})
    if not isinstance(moe, dict):
        _fail("moe", "must be an object")
    return given | {f"moe.{key}": value for key, value in moe.items() if value is not None}


def _check_known(key: str, value: object) -> None:
    if key not in _KNOWN:
        _fail(key[:64], "is not known: the model may be another than what is served")
    if key in _FIXED and value not in _FIXED[key]:
        _fail(key, f"must be {str(_FIXED[key][0]).lower()}")


def _complete(sizes: dict[str, int], spelling: Mapping[str, str], *, sparse: bool) -> None:
    """Adds the size of a head if it is missing. All other sizes are required, those of experts in a sparse model."""
    optional = {"head_dim"} if sparse else {"head_dim", "num_local_experts", "num_experts_per_tok"}
    for key in _SIZES:
        if key not in sizes and key not in optional:
            _fail(spelling[key], "is missing")
    if sizes["num_hidden_layers"] > MAX_LAYERS:
        _fail(spelling["num_hidden_layers"], f"must be at most {MAX_LAYERS}")
    if sizes["hidden_size"] % sizes["num_attention_heads"] and "head_dim" not in sizes:
        _fail(spelling["num_attention_heads"], f"must divide {spelling['hidden_size']}")
    sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])


def _read_size(given: Mapping[str, Any], key: str) -> int:
    value = given[key]
    if type(value) is not int or value < 1:
        _fail(key, "must be a whole number above zero")
    return value


def _read_number(given: Mapping[str, Any], key: str) -> float:
    value = given.get(key)
    if value is None:
        _fail(key, "is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
        _fail(key, "must be a number above zero")
    return float(value)


def _read_theta(given: Mapping[str, Any]) -> float:
    """The first releases do not state theta: their loader used that of a short context if there was a window."""
    if "rope_theta" in given:
        return _read_number(given, "rope_theta")
    return 1e4 if isinstance(given.get("sliding_window"), int | str) else 1e6


def _read_tied(given: Mapping[str, Any]) -> bool:
    tied = given.get(_TIED, False)
    if not isinstance(tied, bool):
        _fail(_TIED, "must be true or false")
    return tied


def _read_windows(given: Mapping[str, Any], sizes: Mapping[str, int], *, sparse: bool) -> dict[str, Any]:
    """One window for all layers, or layers with and without one, for which transformers has a class of its own."""
    if all(key in given for key in _WINDOW):
        _fail(_WINDOW[1], f"says the same as {_WINDOW[0]}: only one may be there")
    key = next((name for name in _WINDOW if name in given), _WINDOW[0])
    value = given.get(key)
    if not isinstance(value, list):
        return {"sliding_window": None if value is None else _parse_window(key, value)}
    num_layers = sizes["num_hidden_layers"]
    if not value or num_layers % len(value):
        _fail(key, f"must have as many windows as there are layers, {num_layers}, or a part that repeats")
    # A window as long as the context has no effect.
    context = sizes["max_position_embeddings"]
    parsed = [None if item is None else _parse_window(key, item) for item in value]
    windows = [None if item is None or item >= context else item for item in parsed]
    lengths = {item for item in windows if item is not None}
    if len(set(windows)) == 1:
        return {"sliding_window": windows[0]}
    if len(lengths) > 1 or sparse:
        _fail(key, "layers with windows of several lengths are not served")
    types = ["full_attention" if item is None else "sliding_attention" for item in windows]
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "sliding_window": lengths.pop(),
        "layer_types": types * (num_layers // len(types)),
    }


def _parse_window(key: str, value: object) -> int:
    """Some releases write the number in quotes."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        value = int(value)
    if type(value) is not int or value < 1:
        _fail(key, "must be a whole number above zero, or a list of them")
    return value
