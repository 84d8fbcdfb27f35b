"""The text part of Llama-4: each token has one expert, whose input is multiplied by the weight, and a shared expert.

In most layers a token attends only to its own chunk of positions, with rotary positions; every few layers, one attends to
all positions and has no rotary ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    DecoderSizes,
    assemble,
    dense_layer,
    expert_layout,
    expert_size_checks,
    read_decoder,
    read_layer_types,
    read_slots,
)
from moesaic.families.defaults import DEFAULTS
from moesaic.families.model import (
    Attention,
    ExpertLayer,
    ExpertModule,
    GateRule,
    Layout,
    MoeModel,
    WeightPattern,
)

_BLOCK = blocks.LAYER + "feed_forward."
_GATE = _BLOCK + "router.weight"
_LAYOUT: Layout = {
    "gate": WeightPattern(_BLOCK + "experts.gate_up_proj", stacked=True, part=(0, 2), transposed=True),
    "up": WeightPattern(_BLOCK + "experts.gate_up_proj", stacked=True, part=(1, 2), transposed=True),
    "down": WeightPattern(_BLOCK + "experts.down_proj", stacked=True, transposed=True),
}
_FULL, _CHUNKED = "full_attention", "chunked_attention"

# In a folder with a vision part, the text part is a model within the model. The other parts do not affect text tokens.
_TEXT = "language_model."
_VISION = ("vision_model.", "multi_modal_projector.")


def describe_text(checkpoint: Checkpoint, config: Config) -> MoeModel:
    decoder = read_decoder(config)
    hidden_size = decoder.hidden_size
    sparse = _sparse_layers(config, decoder.num_layers)
    attention = blocks.read_attention(config, hidden_size)
    slots = read_slots(config, "num_local_experts", "num_experts")
    if slots.top_k != 1:
        config.fail("num_experts_per_tok", "must be 1: each of more would be asked something else")
    layout, dtype = expert_layout(checkpoint, (_LAYOUT,), min(sparse))
    activation = config.choice("hidden_act", ("silu",))
    module = ExpertModule(hidden_size, config.size("intermediate_size"), activation)
    rule = GateRule(slots.top_k, score="logit", weight="sigmoid", weighs="input")
    experts = ExpertLayer(slots.count, module, layout, dtype, rule)
    plain = ExpertModule(hidden_size, config.size("intermediate_size_mlp"), activation)
    dense_mlp = dense_layer(_BLOCK, plain, dtype)
    bias = config.flag("attention_bias")

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(hidden_size, decoder.vocab_size)
        for layer in range(decoder.num_layers):
            yield blocks.pre_norm_layer(layer, attention, hidden_size, bias=bias, output_bias=bias)
            if layer in sparse:
                yield [blocks.tensor(_GATE.format(layer=layer), slots.count, hidden_size)]
                shared = _BLOCK.format(layer=layer) + "shared_expert."
                yield blocks.mlp_tensors(shared, hidden_size, module.inner_size)

    return assemble(
        checkpoint,
        config,
        decoder,
        family="llama4_text",
        mixers=_mixers(config, decoder, attention),
        experts={layer: experts if layer in sparse else dense_mlp for layer in range(decoder.num_layers)},
        dense=dense(),
        size_checks=expert_size_checks(min(sparse), experts, slots, _GATE, "intermediate_size"),
    )


def describe_folder(checkpoint: Checkpoint, config: Config) -> MoeModel:
    """The text part of a folder that also has a vision part."""
    values = config.values.get("text_config")
    if not isinstance(values, Mapping):
        config.fail("text_config", "must be an object")
    text = {
        name.removeprefix(_TEXT): entry
        for name, entry in checkpoint.tensors.items()
        if name.startswith(_TEXT)
    }
    part = Config(values, file=f"{checkpoint.config_file}: text_config", defaults=DEFAULTS["llama4_text"])
    model = describe_text(replace(checkpoint, tensors=text), part)
    vision = frozenset(name for name in checkpoint.tensors if name.startswith(_VISION))
    return _inside(replace(model, ignored=vision))


def _inside(model: MoeModel) -> MoeModel:
    """The model with its tensors under their full names in the folder."""

    def moved(experts: ExpertLayer) -> ExpertLayer:
        layout = {
            weight: replace(pattern, tensor=_TEXT + pattern.tensor)
            for weight, pattern in experts.layout.items()
        }
        return replace(experts, layout=layout)

    return replace(
        model,
        experts={layer: moved(experts) for layer, experts in model.experts.items()},
        dense={name: replace(dense, source=_TEXT + dense.source) for name, dense in model.dense.items()},
    )


def _sparse_layers(config: Config, num_layers: int) -> frozenset[int]:
    step = config.size("interleave_moe_layer_step")
    listed = config.sizes("moe_layers") if config.has("moe_layers") else range(step - 1, num_layers, step)
    sparse = frozenset(listed) & frozenset(range(num_layers))
    if not sparse:
        config.fail("moe_layers", "leaves no layer with experts")
    return sparse


def _mixers(config: Config, decoder: DecoderSizes, attention: Attention) -> tuple[Attention, ...]:
    kinds = read_layer_types(config, decoder.num_layers, _FULL, _CHUNKED) or tuple(
        _CHUNKED if rotary else _FULL for rotary in _rotary_layers(config, decoder.num_layers)
    )
    chunk = config.size("attention_chunk_size") if _CHUNKED in kinds else None
    return tuple(replace(attention, chunk=chunk if kind == _CHUNKED else None) for kind in kinds)


def _rotary_layers(config: Config, num_layers: int) -> tuple[bool, ...]:
    """Which layers have rotary positions. Despite its name, `no_rope_layers` marks them by a one."""
    listed = config.sizes("no_rope_layers")
    if listed and len(listed) < num_layers:
        config.fail("no_rope_layers", f"must have an entry for each of {num_layers} layers")
    interval = config.size("no_rope_layer_interval", default=4)
    return tuple(
        bool(listed[layer]) if listed else (layer + 1) % interval != 0 for layer in range(num_layers)
    )
