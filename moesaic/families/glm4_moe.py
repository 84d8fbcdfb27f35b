"""GLM-4-MoE (GLM-4.5): the gate of DeepSeek-V3, shared experts and first dense layers, over ordinary attention."""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    assemble,
    layers_behind_dense,
    read_channels,
    read_decoder,
    read_num_predictors,
    read_slots,
)
from moesaic.families.deepseek import gate, shared_experts, sigmoid_rule
from moesaic.families.model import MoeModel


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    decoder = read_decoder(config)
    hidden_size = decoder.hidden_size
    slots = read_slots(config, "n_routed_experts", "num_local_experts")
    rule = sigmoid_rule(config, slots)
    sparse = layers_behind_dense(config, decoder.num_layers)
    channels = read_channels(checkpoint, config, decoder, slots, rule, sparse)
    attention = blocks.read_attention(config, hidden_size)
    bias = config.flag("attention_bias")
    normed = config.flag("use_qk_norm")
    shared_size = config.size("n_shared_experts") * channels.module.inner_size

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(hidden_size, decoder.vocab_size)
        for layer in range(decoder.num_layers):
            prefix = blocks.LAYER.format(layer=layer)
            yield blocks.pre_norm_layer(layer, attention, hidden_size, bias=bias)
            if normed:
                yield blocks.norms(prefix + "self_attn.", attention.head_dim, "q_norm", "k_norm")
            if layer in sparse:
                yield gate(layer, slots.count, hidden_size, rule)
                yield shared_experts(prefix + "mlp.", hidden_size, shared_size)

    return assemble(
        checkpoint,
        config,
        decoder,
        family="glm4_moe",
        mixers=(attention,) * decoder.num_layers,
        experts=channels.layers,
        dense=dense(),
        size_checks=channels.size_checks,
        num_predictors=read_num_predictors(config),
    )
