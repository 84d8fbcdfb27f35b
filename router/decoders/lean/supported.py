"""Which models the lean decoder supports: the families, their config keys and parameters, as data.

A config key that is not known here might change the arithmetic, so it is refused by name: the hf decoder serves such a
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from moesaic.errors import Unsupported
from moesaic.families.model import Attention, GateRule, MoeModel

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# The parameters of a layer; `layer_prefix` precedes each name.
ATTENTION_NORM = "input_layernorm.weight"
EXPERTS_NORM = "post_attention_layernorm.weight"
# The projections of queries, keys and values; each has a weight and may have a bias.
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj.weight"
# The norms of queries and of keys, over each head or over all heads at once, as their length shows.
QUERY_NORM = "self_attn.q_norm.weight"
KEY_NORM = "self_attn.k_norm.weight"
GATE = "mlp.gate.weight"
# The gated MLP of a layer without experts.
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
# The gated MLP that every token gets in addition to its experts, and the gate whose sigmoid weighs it.
SHARED_MLP = (
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
)
SHARED_GATE = "mlp.shared_expert_gate.weight"

_ENDS = frozenset({EMBEDDING, NORM, HEAD})
_KNOWN = frozenset({
    ATTENTION_NORM, EXPERTS_NORM, OUTPUT, QUERY_NORM, KEY_NORM, GATE, SHARED_GATE, *MLP, *SHARED_MLP,
    *(f"{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias")),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class SupportedModel:
    """A pre-norm decoder with the constants of its arithmetic. Its layers are RMSNorm, rotary attention, RMSNorm, and
    experts or an MLP; after the last come RMSNorm and the head."""

    model: MoeModel
    norm_eps: float
    rope_theta: float


@dataclass(frozen=True, slots=True)
class _Family:
    """The constants that a config may leave out, and the conditions on which the family's arithmetic depends."""

    norm_eps: float
    rope_theta: float
    # Config keys with the only value that each may have, in addition to the keys of `_HARMLESS`.
    fixed: Mapping[str, Any]


_PLAIN = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None}

_FAMILIES = {
    "llama": _Family(norm_eps=1e-6, rope_theta=1e4, fixed=_PLAIN | {"mlp_bias": False}),
    "ministral": _Family(norm_eps=1e-6, rope_theta=1e4, fixed=_PLAIN),
    "mixtral": _Family(norm_eps=1e-5, rope_theta=1e6, fixed=_PLAIN),
    "mistral": _Family(norm_eps=1e-6, rope_theta=1e4, fixed=_PLAIN),
    "qwen2_moe": _Family(norm_eps=1e-6, rope_theta=1e4, fixed=_PLAIN),
    "qwen3_moe": _Family(norm_eps=1e-6, rope_theta=1e4, fixed=_PLAIN),
    "olmoe": _Family(norm_eps=1e-5, rope_theta=1e4, fixed=_PLAIN | {"clip_qkv": None}),
}

# The config keys that moesaic/families or this module reads, and those that have no part in inference.
_HARMLESS = frozenset({
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "decoder_sparse_step", "dtype",
    "eos_token_id", "head_dim", "hidden_size", "id2label", "initializer_range", "intermediate_size", "label2id",
    "layer_types", "max_position_embeddings", "max_window_layers", "mlp_only_layers", "model_type",
    "moe_intermediate_size", "norm_topk_prob", "num_attention_heads", "num_experts", "num_experts_per_tok",
    "num_hidden_layers", "num_key_value_heads", "num_local_experts", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "qkv_bias", "return_dict", "rms_norm_eps",
    "rope_parameters", "rope_theta", "router_aux_loss_coef", "router_jitter_noise",
    "shared_expert_intermediate_size", "sliding_window", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache", "use_sliding_window", "vocab_size",
})  # fmt: skip


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def check_supported(checkpoint: Checkpoint, model: MoeModel) -> SupportedModel:
    """Raises Unsupported, which names the config key or the parameter that the lean decoder does not know."""
    config = checkpoint.config
    family = _FAMILIES.get(model.family)
    if family is None:
        raise _unknown("model_type")
    for key, value in config.items():
        if key.startswith("_") or key in _HARMLESS:
            continue
        if key not in family.fixed or value != family.fixed[key]:
            raise _unknown(key)
    _check_layers(model)
    return SupportedModel(
        model,
        norm_eps=_number(config, "rms_norm_eps", family.norm_eps),
        rope_theta=_rope_theta(config, family.rope_theta),
    )


def _check_layers(model: MoeModel) -> None:
    known = {layer_prefix(layer) + name for layer in range(model.num_layers) for name in _KNOWN}
    if unexpected := model.dense.keys() - known - _ENDS:
        raise _unknown(f"parameter {min(unexpected)}")
    for mixer in model.mixers:
        if not isinstance(mixer, Attention) or mixer.chunk is not None or mixer.sinks or mixer.head_dim % 2:
            raise _unknown("kind of attention")
        if (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) != _heads(model):
            raise _unknown("change of heads between layers")
    for experts in model.experts.values():
        if experts.gate is not None and not _is_plain(experts.gate):
            raise _unknown("kind of gate")


def _heads(model: MoeModel) -> tuple[int, int, int]:
    mixer = model.mixers[0]
    assert isinstance(mixer, Attention)
    return mixer.num_heads, mixer.num_kv_heads, mixer.head_dim


def _is_plain(rule: GateRule) -> bool:
    return not (rule.biased or rule.selection_bias) and rule.weighs == "output"


def _rope_theta(config: Mapping[str, Any], default: float) -> float:
    """The base of the rotary frequencies, in either of the two spellings of transformers."""
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise _unknown("rope_parameters")
    if parameters.keys() - {"rope_type", "rope_theta"}:
        raise _unknown("rope_parameters")
    return _number(parameters if "rope_theta" in parameters else config, "rope_theta", default)


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _unknown(key)
    return float(value)


def _unknown(what: str) -> Unsupported:
    return Unsupported(
        f"engine.decoder: the lean decoder does not know this {what} of {CONFIG_FILE}; use hf",
        field="engine.decoder",
    )
