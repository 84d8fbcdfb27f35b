"""Qwen2-MoE and Qwen3-MoE: every `decoder_sparse_step`-th layer has experts, the others have dense MLPs.

Qwen2 has biases on queries, keys and values, and a shared expert that is weighed by a sigmoid. Qwen3 instead has norms
over each head of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import (
    MLP,
    Channels,
    DecoderSizes,
    assemble,
    read_channels,
    read_decoder,
    read_layer_types,
    read_slots,
)
from moesaic.families.model import Attention, GateRule, MoeModel

_GATE = MLP + "gate.weight"


def describe_qwen2(checkpoint: Checkpoint, config: Config) -> MoeModel:
    decoder = read_decoder(config)
    attention = blocks.read_attention(config, decoder.hidden_size)
    channels = _read_channels(checkpoint, config, decoder)
    bias = config.flag("qkv_bias")
    shared_size = config.size("shared_expert_intermediate_size")

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(decoder.hidden_size, decoder.vocab_size)
        for layer in range(decoder.num_layers):
            yield _layer(layer, decoder, attention, channels, bias=bias)
            if layer in channels.sparse:
                yield _shared_expert(MLP.format(layer=layer), decoder.hidden_size, shared_size)

    return assemble(
        checkpoint,
        config,
        decoder,
        family="qwen2_moe",
        mixers=tuple(replace(attention, window=window) for window in _qwen2_windows(config, decoder)),
        experts=channels.layers,
        dense=dense(),
        size_checks=channels.size_checks,
    )


def describe_qwen3(checkpoint: Checkpoint, config: Config) -> MoeModel:
    decoder = read_decoder(config)
    window = config.optional_size("sliding_window") if _has_window(config) else None
    attention = blocks.read_attention(config, decoder.hidden_size, window=window)
    channels = _read_channels(checkpoint, config, decoder)
    bias = config.flag("attention_bias")

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(decoder.hidden_size, decoder.vocab_size)
        for layer in range(decoder.num_layers):
            yield _layer(layer, decoder, attention, channels, bias=bias, output_bias=bias)
            prefix = blocks.LAYER.format(layer=layer) + "self_attn."
            yield blocks.norms(prefix, attention.head_dim, "q_norm", "k_norm")

    return assemble(
        checkpoint,
        config,
        decoder,
        family="qwen3_moe",
        mixers=(attention,) * decoder.num_layers,
        experts=channels.layers,
        dense=dense(),
        size_checks=channels.size_checks,
    )


def _read_channels(checkpoint: Checkpoint, config: Config, decoder: DecoderSizes) -> Channels:
    slots = read_slots(config, "num_experts", "num_local_experts")
    rule = GateRule(slots.top_k, renormalise=config.flag("norm_topk_prob"))
    return read_channels(checkpoint, config, decoder, slots, rule, _sparse_layers(config, decoder.num_layers))


def _sparse_layers(config: Config, num_layers: int) -> frozenset[int]:
    step = config.size("decoder_sparse_step")
    dense = config.sizes("mlp_only_layers")
    sparse = frozenset(layer for layer in range(step - 1, num_layers, step) if layer not in dense)
    if not sparse:
        config.fail("mlp_only_layers" if dense else "decoder_sparse_step", "leaves no layer with experts")
    return sparse


def _has_window(config: Config) -> bool:
    return config.flag("use_sliding_window")


def _qwen2_windows(config: Config, decoder: DecoderSizes) -> Iterator[int | None]:
    """The window of each layer. If the config does not list the layers' types, every second layer below
    `max_window_layers` has the window."""
    kinds = read_layer_types(config, decoder.num_layers, "full_attention", "sliding_attention")
    below = config.count("max_window_layers") if _has_window(config) else 0
    for layer in range(decoder.num_layers):
        narrow = kinds[layer] == "sliding_attention" if kinds else layer % 2 == 0 and layer < below
        if narrow and not _has_window(config):
            config.fail("use_sliding_window", "must be true where layer_types has layers with a window")
        yield config.size("sliding_window") if narrow else None


def _layer(
    layer: int,
    decoder: DecoderSizes,
    attention: Attention,
    channels: Channels,
    *,
    bias: bool,
    output_bias: bool = False,
) -> blocks.Named:
    hidden_size = decoder.hidden_size
    yield from blocks.pre_norm_layer(layer, attention, hidden_size, bias=bias, output_bias=output_bias)
    if layer in channels.sparse:
        yield blocks.tensor(_GATE.format(layer=layer), channels.slots.count, hidden_size)


def _shared_expert(prefix: str, hidden_size: int, inner_size: int) -> blocks.Named:
    yield from blocks.mlp_tensors(prefix + "shared_expert.", hidden_size, inner_size)
    yield blocks.tensor(prefix + "shared_expert_gate.weight", 1, hidden_size)
