"""What the lean decoder has to know of a checkpoint: the names of its tensors and the constants of its arithmetic.

A family is data here, as in moesaic/families.py. Whatever of a config might change the arithmetic and is not known is
refused by name: the stock decoder serves such a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from moesaic.checkpoint import CONFIG_FILE, Checkpoint
from moesaic.errors import Unsupported
from moesaic.families import MoeModel


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Names of the tensors of one layer."""

    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    experts_norm: str
    gate: str


@dataclass(frozen=True, slots=True)
class DecoderLayout:
    """A pre-norm decoder: RMSNorm, rotary attention without biases, RMSNorm, experts; then RMSNorm and the head."""

    embedding: str
    layers: tuple[LayerTensors, ...]
    norm: str
    # The embedding itself where both are tied.
    head: str
    norm_eps: float
    rope_theta: float

    @property
    def names(self) -> frozenset[str]:
        """Every tensor that is read."""
        layers = (name for layer in self.layers for name in astuple(layer))
        return frozenset((self.embedding, self.norm, self.head, *layers))


@dataclass(frozen=True, slots=True)
class _Family:
    """`gates` has the names that the gate goes by, the first of them that is there counts."""

    gates: tuple[str, ...]
    norm_eps: float
    rope_theta: float
    # Keys of the config with the only value that each may have, beside those of `_HARMLESS`.
    fixed: Mapping[str, Any]


_FAMILIES = {
    "mixtral": _Family(
        gates=("model.layers.{}.block_sparse_moe.gate.weight", "model.layers.{}.mlp.gate.weight"),
        norm_eps=1e-5,
        rope_theta=1e6,
        fixed={"hidden_act": "silu", "attention_bias": False, "rope_scaling": None},
    ),
}

# What families.py reads, what this module reads, and what has no part in a forward pass that trains nothing.
_HARMLESS = frozenset({
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id", "head_dim",
    "hidden_size", "id2label", "initializer_range", "intermediate_size", "label2id", "max_position_embeddings",
    "model_type", "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "return_dict", "rms_norm_eps", "rope_parameters", "rope_theta",
    "router_aux_loss_coef", "router_jitter_noise", "sliding_window", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size",
})  # fmt: skip


def describe_decoder(checkpoint: Checkpoint, shape: MoeModel) -> DecoderLayout:
    """Raises Unsupported that names the config key which the lean decoder does not know."""
    config = checkpoint.config
    family = _FAMILIES.get(shape.family)
    if family is None:
        raise _unknown("model_type")
    for key, value in config.items():
        if key.startswith("_") or key in _HARMLESS:
            continue
        if key not in family.fixed or value != family.fixed[key]:
            raise _unknown(key)
    if shape.head_dim % 2:
        raise _unknown("head_dim")
    gate = next(name for name in family.gates if name.format(0) in checkpoint.tensors)
    tied = config.get("tie_word_embeddings", False)
    return DecoderLayout(
        embedding="model.embed_tokens.weight",
        layers=tuple(_layer(index, gate.format(index)) for index in range(shape.num_layers)),
        norm="model.norm.weight",
        head="model.embed_tokens.weight" if tied else "lm_head.weight",
        norm_eps=_number(config, "rms_norm_eps", family.norm_eps),
        rope_theta=_rope_theta(config, family.rope_theta),
    )


def _layer(index: int, gate: str) -> LayerTensors:
    prefix = f"model.layers.{index}."
    return LayerTensors(
        attention_norm=prefix + "input_layernorm.weight",
        query=prefix + "self_attn.q_proj.weight",
        key=prefix + "self_attn.k_proj.weight",
        value=prefix + "self_attn.v_proj.weight",
        output=prefix + "self_attn.o_proj.weight",
        experts_norm=prefix + "post_attention_layernorm.weight",
        gate=gate,
    )


def _rope_theta(config: Mapping[str, Any], default: float) -> float:
    """The base of the rotary frequencies, under either spelling of transformers."""
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


def _unknown(key: str) -> Unsupported:
    return Unsupported(
        f"engine.decoder: the lean decoder does not know this {key} of {CONFIG_FILE}; use stock",
        field="engine.decoder",
    )
