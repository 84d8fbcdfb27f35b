"""gpt-oss: every second layer has a window, each head a learned sink, and experts have biases and a clamped gate.

The experts of a layer are stacked in one tensor: as floats, transposed to [in, out] with alternating gate and up
columns, or as mxfp4 in [out, in] with alternating rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    MLP,
    DecoderSizes,
    assemble,
    expert_layout,
    expert_size_checks,
    read_decoder,
    read_layer_types,
    read_slots,
)
from moesaic.families.model import Attention, ExpertLayer, ExpertModule, GateRule, MoeModel, WeightPattern

_EXPERTS = MLP + "experts."
_ROUTER = MLP + "router."
_WINDOW = "sliding_attention"
# The slope of the sigmoid in the activation of the experts, which cannot be configured here.
_ALPHA = 1.702


def _layout(*, mxfp4: bool) -> dict[str, WeightPattern]:
    def weight(name: str, part: tuple[int, int] = (0, 1)) -> WeightPattern:
        tensor, interleaved = _EXPERTS + name, part[1] > 1
        if mxfp4:
            return WeightPattern(
                tensor + "_blocks", True, part, interleaved, encoding="mxfp4", scales=tensor + "_scales"
            )
        return WeightPattern(tensor, True, part, interleaved, transposed=True)

    def bias(name: str, part: tuple[int, int] = (0, 1)) -> WeightPattern:
        return WeightPattern(f"{_EXPERTS}{name}_bias", True, part, part[1] > 1)

    return {
        "gate": weight("gate_up_proj", (0, 2)),
        "up": weight("gate_up_proj", (1, 2)),
        "down": weight("down_proj"),
        "gate_bias": bias("gate_up_proj", (0, 2)),
        "up_bias": bias("gate_up_proj", (1, 2)),
        "down_bias": bias("down_proj"),
    }


_LAYOUTS = (_layout(mxfp4=False), _layout(mxfp4=True))


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    decoder = read_decoder(config)
    slots = read_slots(config, "num_local_experts", "num_experts")
    attention = replace(blocks.read_attention(config, decoder.hidden_size), sinks=True)
    if config.number("swiglu_alpha") != _ALPHA:
        config.fail("swiglu_alpha", f"must be {_ALPHA}")
    config.choice("hidden_act", ("silu",))
    module = ExpertModule(
        decoder.hidden_size,
        config.size("intermediate_size"),
        "clamped_swiglu",
        biased=True,
        limit=config.number("swiglu_limit"),
    )
    layout, dtype = expert_layout(checkpoint, _LAYOUTS, 0)
    rule = GateRule(slots.top_k, score="logit", weight="softmax", biased=True)
    experts = ExpertLayer(slots.count, module, layout, dtype, rule)
    bias = config.flag("attention_bias")

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(decoder.hidden_size, decoder.vocab_size)
        for layer in range(decoder.num_layers):
            yield _layer(layer, decoder, attention, slots.count, bias)

    return assemble(
        checkpoint,
        config,
        decoder,
        family="gpt_oss",
        mixers=_mixers(config, decoder, attention),
        experts=dict.fromkeys(range(decoder.num_layers), experts),
        dense=dense(),
        size_checks=expert_size_checks(0, experts, slots, _ROUTER + "weight", "intermediate_size"),
    )


def _mixers(config: Config, decoder: DecoderSizes, attention: Attention) -> tuple[Attention, ...]:
    kinds = read_layer_types(config, decoder.num_layers, "full_attention", _WINDOW) or tuple(
        "full_attention" if layer % 2 else _WINDOW for layer in range(decoder.num_layers)
    )
    window = config.size("sliding_window") if _WINDOW in kinds else None
    return tuple(replace(attention, window=window if kind == _WINDOW else None) for kind in kinds)


def _layer(
    layer: int, decoder: DecoderSizes, attention: Attention, num_slots: int, bias: bool
) -> blocks.Named:
    hidden_size = decoder.hidden_size
    yield from blocks.pre_norm_layer(layer, attention, hidden_size, bias=bias, output_bias=bias)
    yield blocks.tensor(blocks.LAYER.format(layer=layer) + "self_attn.sinks", attention.num_heads)
    router = _ROUTER.format(layer=layer)
    yield blocks.tensor(router + "weight", num_slots, hidden_size)
    yield blocks.tensor(router + "bias", num_slots)
