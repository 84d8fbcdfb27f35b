"""Phi-2 in the layouts of transformers and of its authors, and Phixtral, which has several MLPs of Phi-2 in each block.

All weights have biases, including those of the experts, which have no gated branch. Blocks are parallel: attention and
MLP both read the output of the block's one norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import DecoderSizes, Slots, assemble, expert_layout, read_decoder, read_slots
from moesaic.families.model import (
    ACTIVATIONS,
    Attention,
    DenseTensor,
    ExpertLayer,
    ExpertModule,
    GateRule,
    Layout,
    MoeModel,
    WeightPattern,
)
from moesaic.families.tensor_check import check_num_layers


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of a layout's modules. `layer` has {layer} and ends with a dot; `joined` holds the rows of queries, then
    keys, then values, if the layout joins them."""

    layer: str
    embedding: str
    final_norm: str
    head: str
    norm: str
    output: str
    joined: str | None = None


_NEW = _Names(
    blocks.LAYER,
    "model.embed_tokens",
    "model.final_layernorm",
    "lm_head",
    "input_layernorm",
    "self_attn.dense",
)
_OLD = _Names(
    "transformer.h.{layer}.",
    "transformer.embd.wte",
    "lm_head.ln",
    "lm_head.linear",
    "ln",
    "mixer.out_proj",
    "mixer.Wqkv",
)


def _mlp(prefix: str) -> Layout:
    return {
        weight + ending: WeightPattern(f"{prefix}{name}.{kind}")
        for ending, kind in (("", "weight"), ("_bias", "bias"))
        for weight, name in (("up", "fc1"), ("down", "fc2"))
    }


_NEW_MLP = _mlp(_NEW.layer + "mlp.")
_OLD_MLP = _mlp(_OLD.layer + "mlp.")
_PHIXTRAL_MLPS = _mlp(_OLD.layer + "moe.mlp.{slot}.")
_PHIXTRAL_GATE = _OLD.layer + "moe.gate.weight"

# The first one, gelu_new, is the default of the family.
_ACTIVATIONS = ("gelu_new", *(name for name in ACTIVATIONS if name not in ("gelu_new", "clamped_swiglu")))
# The keys of the old config, by the names that transformers has for them.
_SPELLING = {
    "hidden_act": "activation_function",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "num_key_value_heads": "n_head_kv",
}
_SAME = ("vocab_size", "tie_word_embeddings", "num_local_experts", "num_experts_per_tok")
_READ = {*_SPELLING.values(), *_SAME, "rotary_dim", "pad_vocab_size_multiple"}
_HARMLESS = {
    "architectures", "attn_pdrop", "auto_map", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id", "flash_attn",
    "flash_rotary", "fused_dense", "initializer_range", "model_type", "pad_token_id", "resid_pdrop", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_ROTARY_BASE = 10000.0
_PADDED_TO = 64


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    """Phi in the layout of transformers."""
    return _describe(checkpoint, config, _NEW, (_NEW_MLP,))


def describe_old(checkpoint: Checkpoint, config: Config) -> MoeModel:
    """Phi and Phixtral in the old layout. Unknown keys are refused, as they may change the arithmetic."""
    for key, value in config.values.items():
        if key not in _READ and key not in _HARMLESS and not key.startswith("_") and value is not None:
            config.fail(key, "is not known in this layout")
    values = _in_new_words(config)
    spelled = Config(values, file=checkpoint.config_file, spelling=_SPELLING)
    model = _describe(checkpoint, spelled, _OLD, (_OLD_MLP, _PHIXTRAL_MLPS))
    check_num_layers(checkpoint, spelled, "num_hidden_layers", model.num_layers, _OLD.layer)
    return replace(model, transformers_config=values)


def _in_new_words(config: Config) -> dict[str, Any]:
    """The config of the same model in transformers."""
    spelling = {**_SPELLING, **{key: key for key in _SAME}}
    values = {key: config.values[old] for key, old in spelling.items() if config.has(old)}
    hidden_size, num_heads = config.size("n_embd"), config.size("n_head")
    multiple = config.size("pad_vocab_size_multiple", default=_PADDED_TO)
    return {
        "intermediate_size": 4 * hidden_size,
        "num_key_value_heads": num_heads,
        "layer_norm_eps": 1e-5,
        **values,
        "model_type": "phi",
        "vocab_size": -(-config.size("vocab_size") // multiple) * multiple,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _ROTARY_BASE,
            "partial_rotary_factor": _rotary_share(config, hidden_size // num_heads),
        },
    }


def _rotary_share(config: Config, head_dim: int) -> float:
    """The rotary share of a head, such that transformers, which rounds down to whole dimensions, finds `rotary_dim`."""
    rotary_dim = config.size("rotary_dim")
    if rotary_dim % 2 or rotary_dim > head_dim:
        config.fail("rotary_dim", f"must be even and at most the size of a head, {head_dim}")
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)


def _describe(checkpoint: Checkpoint, config: Config, names: _Names, layouts: tuple[Layout, ...]) -> MoeModel:
    decoder = read_decoder(config)
    attention = blocks.read_attention(config, decoder.hidden_size)
    layout, dtype = expert_layout(checkpoint, layouts, 0)
    slots = _read_slots(config, layout)
    activation = config.choice("hidden_act", _ACTIVATIONS)
    module = ExpertModule(
        decoder.hidden_size, config.size("intermediate_size"), activation, gated=False, biased=True
    )
    experts = ExpertLayer(
        1 if slots is None else slots.count,
        module,
        layout,
        dtype,
        None if slots is None else GateRule(slots.top_k, score="logit", weight="softmax"),
        {weight: pattern.tensor for weight, pattern in _NEW_MLP.items()},
    )
    normed = config.flag("qk_layernorm", default=False)
    dense = [_ends(decoder, names)]
    for layer in range(decoder.num_layers):
        dense.append(_block(layer, names, attention, decoder.hidden_size, normed=normed))
        if slots is not None:
            dense.append(_gate(layer, slots, decoder.hidden_size))
    size_checks = [
        ("vocab_size", decoder.vocab_size, f"{names.embedding}.weight", 0),
        ("hidden_size", decoder.hidden_size, f"{names.embedding}.weight", 1),
        ("intermediate_size", module.inner_size, layout["up"].name(0, 0), 0),
    ]
    if slots is not None:
        size_checks.append((slots.key, slots.count, _PHIXTRAL_GATE.format(layer=0), 0))
    return assemble(
        checkpoint,
        config,
        decoder,
        family="phi" if slots is None else "phixtral",
        mixers=(attention,) * decoder.num_layers,
        experts=dict.fromkeys(range(decoder.num_layers), experts),
        dense=dense,
        size_checks=size_checks,
    )


def _read_slots(config: Config, layout: Layout) -> Slots | None:
    """The slots of Phixtral, or None if each layer has one MLP."""
    if layout is _PHIXTRAL_MLPS:
        return read_slots(config, "num_local_experts")
    for key in ("num_local_experts", "num_experts_per_tok"):
        if config.has(key):
            config.fail(key, "the tensors are those of a model without experts")
    return None


def _ends(decoder: DecoderSizes, names: _Names) -> blocks.Named:
    size, vocab_size = decoder.hidden_size, decoder.vocab_size
    yield "model.embed_tokens.weight", DenseTensor((vocab_size, size), f"{names.embedding}.weight")
    yield from _both("model.final_layernorm", names.final_norm, size)
    yield from _both("lm_head", names.head, vocab_size, size)


def _block(
    layer: int, names: _Names, attention: Attention, hidden_size: int, *, normed: bool
) -> blocks.Named:
    new, old = (prefix.format(layer=layer) for prefix in (_NEW.layer, names.layer))
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    yield from _both(new + _NEW.norm, old + names.norm, hidden_size)
    yield from _both(new + _NEW.output, old + names.output, hidden_size, queries)
    first = 0
    for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        name = f"{new}self_attn.{part}"
        if names.joined is None:
            yield from _both(name, name, rows, hidden_size)
        else:
            span = (first, first + rows)
            yield from _both(name, old + names.joined, rows, hidden_size, span=span)
        first += rows
    if normed:
        for part in ("q_layernorm", "k_layernorm"):
            yield from _both(f"{new}self_attn.{part}", f"{old}self_attn.{part}", attention.head_dim)


def _gate(layer: int, slots: Slots, hidden_size: int) -> blocks.Named:
    """The gate. Its parameter is in the place of the MLP of transformers, under the name that other families use."""
    source = _PHIXTRAL_GATE.format(layer=layer)
    yield f"{_NEW.layer.format(layer=layer)}mlp.gate.weight", DenseTensor((slots.count, hidden_size), source)


def _both(name: str, source: str, *shape: int, span: tuple[int, int] | None = None) -> blocks.Named:
    """Weight and bias of `source`, or their rows in `span`."""
    yield f"{name}.weight", DenseTensor(shape, f"{source}.weight", span)
    yield f"{name}.bias", DenseTensor(shape[:1], f"{source}.bias", span)
