"""OLMoE and FlexOlmo: every layer has experts, and one norm each for all heads of queries and all heads of keys.

OLMoE normalises the input of each block, FlexOlmo its output; the experts of FlexOlmo come from different owners.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    MLP,
    MLP_LAYOUTS,
    DecoderSizes,
    assemble,
    expert_layout,
    expert_size_checks,
    read_decoder,
    read_slots,
)
from moesaic.families.model import Attention, ExpertLayer, ExpertModule, GateRule, MoeModel

_GATE = MLP + "gate.weight"


def describe_olmoe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    return _describe(checkpoint, config, "olmoe", ("input_layernorm", "post_attention_layernorm"))


def describe_flex_olmo(checkpoint: Checkpoint, config: Config) -> MoeModel:
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    return _describe(checkpoint, config, "flex_olmo", norms)


def _describe(checkpoint: Checkpoint, config: Config, family: str, norms: tuple[str, str]) -> MoeModel:
    decoder = read_decoder(config)
    attention = blocks.read_attention(config, decoder.hidden_size)
    slots = read_slots(config, "num_experts", "num_local_experts")
    layout, dtype = expert_layout(checkpoint, MLP_LAYOUTS, 0)
    module = ExpertModule(
        decoder.hidden_size, config.size("intermediate_size"), config.choice("hidden_act", ("silu",))
    )
    rule = GateRule(slots.top_k, renormalise=config.flag("norm_topk_prob"))
    experts = ExpertLayer(slots.count, module, layout, dtype, rule)
    bias = config.flag("attention_bias")

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(decoder.hidden_size, decoder.vocab_size)
        for layer in range(decoder.num_layers):
            prefix = blocks.LAYER.format(layer=layer)
            yield blocks.norms(prefix, decoder.hidden_size, *norms)
            yield _attention(prefix + "self_attn.", decoder, attention, bias)
            yield [blocks.tensor(_GATE.format(layer=layer), slots.count, decoder.hidden_size)]

    return assemble(
        checkpoint,
        config,
        decoder,
        family=family,
        mixers=(attention,) * decoder.num_layers,
        experts=dict.fromkeys(range(decoder.num_layers), experts),
        dense=dense(),
        size_checks=expert_size_checks(0, experts, slots, _GATE, "intermediate_size"),
    )


def _attention(prefix: str, decoder: DecoderSizes, attention: Attention, bias: bool) -> blocks.Named:
    yield from blocks.attention_tensors(prefix, attention, decoder.hidden_size, bias=bias, output_bias=bias)
    yield blocks.tensor(prefix + "q_norm.weight", attention.num_heads * attention.head_dim)
    yield blocks.tensor(prefix + "k_norm.weight", attention.num_kv_heads * attention.head_dim)
