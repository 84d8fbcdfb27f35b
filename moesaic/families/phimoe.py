"""Phi-3.5-MoE: norms have biases, and a sparse mixer chooses and weighs the two experts of a token one by one."""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    DecoderSizes,
    assemble,
    expert_layout,
    expert_size_checks,
    read_decoder,
    read_slots,
)
from moesaic.families.model import Attention, DenseTensor, ExpertLayer, ExpertModule, GateRule, MoeModel

_CLASSIC = blocks.separate(blocks.LAYER + "block_sparse_moe.experts.{slot}.", "w1", "w3", "w2")
_FUSED = blocks.fused(blocks.LAYER + "mlp.experts.")
_GATES = (
    (_CLASSIC, blocks.LAYER + "block_sparse_moe.gate.weight"),
    (_FUSED, blocks.LAYER + "mlp.router.weight"),
)
_NUM_CHOSEN = 2


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    decoder = read_decoder(config)
    attention = blocks.read_attention(
        config, decoder.hidden_size, window=config.optional_size("sliding_window")
    )
    slots = read_slots(config, "num_local_experts", "num_experts")
    if slots.top_k != _NUM_CHOSEN:
        config.fail("num_experts_per_tok", f"must be {_NUM_CHOSEN}: the sparse mixer chooses so many")
    layout, dtype = expert_layout(checkpoint, (_CLASSIC, _FUSED), 0)
    gate = next(name for known, name in _GATES if known is layout)
    module = ExpertModule(
        decoder.hidden_size, config.size("intermediate_size"), config.choice("hidden_act", ("silu",))
    )
    jitter = config.number("router_jitter_noise")
    rule = GateRule(slots.top_k, score="logit", weight="sparse_mixer", jitter=jitter)
    experts = ExpertLayer(slots.count, module, layout, dtype, rule)
    bias = config.flag("attention_bias")

    def dense() -> Iterator[blocks.Named]:
        yield _ends(decoder, head_bias=config.flag("lm_head_bias"))
        for layer in range(decoder.num_layers):
            yield _layer(layer, decoder, attention, bias)
            source = gate.format(layer=layer)
            router = blocks.LAYER.format(layer=layer) + "mlp.router.weight"
            yield [(router, DenseTensor((slots.count, decoder.hidden_size), source))]

    return assemble(
        checkpoint,
        config,
        decoder,
        family="phimoe",
        mixers=(attention,) * decoder.num_layers,
        experts=dict.fromkeys(range(decoder.num_layers), experts),
        dense=dense(),
        size_checks=expert_size_checks(0, experts, slots, gate, "intermediate_size"),
    )


def _ends(decoder: DecoderSizes, *, head_bias: bool) -> blocks.Named:
    yield from blocks.ends(decoder.hidden_size, decoder.vocab_size)
    yield blocks.tensor("model.norm.bias", decoder.hidden_size)
    if head_bias:
        yield blocks.tensor("lm_head.bias", decoder.vocab_size)


def _layer(layer: int, decoder: DecoderSizes, attention: Attention, bias: bool) -> blocks.Named:
    prefix, hidden_size = blocks.LAYER.format(layer=layer), decoder.hidden_size
    yield from blocks.norms(prefix, hidden_size, "input_layernorm", "post_attention_layernorm", bias=True)
    yield from blocks.attention_tensors(
        prefix + "self_attn.", attention, hidden_size, bias=bias, output_bias=bias
    )
