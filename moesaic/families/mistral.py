"""Mistral, Ministral and Llama: dense decoders of one structure, whose MLPs are the only experts of their layers."""

from __future__ import annotations

from dataclasses import replace

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks, mistral_format
from moesaic.families.config import Config
from moesaic.families.decoder import DecoderSizes, assemble, expert_layout, read_decoder, read_layer_types
from moesaic.families.model import Attention, ExpertLayer, ExpertModule, Layout, MoeModel

_MLP = blocks.dense_layout(blocks.LAYER + "mlp.")


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    """Mistral: all layers have the same window, or none."""
    decoder = read_decoder(config)
    window = config.optional_size("sliding_window")
    return _describe(checkpoint, config, decoder, "mistral", (window,) * decoder.num_layers)


def describe_ministral(checkpoint: Checkpoint, config: Config) -> MoeModel:
    """Ministral: each layer has the window or none."""
    decoder, window = read_decoder(config), config.optional_size("sliding_window")
    kinds = read_layer_types(config, decoder.num_layers, "full_attention", "sliding_attention")
    if kinds is None:
        kinds = ("sliding_attention",) * decoder.num_layers
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return _describe(checkpoint, config, decoder, "ministral", windows)


def describe_llama(checkpoint: Checkpoint, config: Config) -> MoeModel:
    """Llama: no layer has a window; projections and MLP may have biases."""
    decoder = read_decoder(config)
    return _describe(
        checkpoint,
        config,
        decoder,
        "llama",
        (None,) * decoder.num_layers,
        attention_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


def _describe(
    checkpoint: Checkpoint,
    config: Config,
    decoder: DecoderSizes,
    family: str,
    windows: tuple[int | None, ...],
    *,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> MoeModel:
    hidden_size, inner_size = decoder.hidden_size, config.size("intermediate_size")
    attention = blocks.read_attention(config, hidden_size)
    module = ExpertModule(hidden_size, inner_size, config.choice("hidden_act", ("silu",)), biased=mlp_bias)
    parameters = _with_biases(_MLP) if mlp_bias else _MLP
    layout, dtype = expert_layout(
        checkpoint, (mistral_format.DENSE if checkpoint.in_mistral_format else parameters,), layer=0
    )
    names = {weight: pattern.tensor for weight, pattern in parameters.items()}
    experts = ExpertLayer(1, module, layout, dtype, None, names)

    model = assemble(
        checkpoint,
        config,
        decoder,
        family=family,
        mixers=tuple(_with_window(attention, window) for window in windows),
        experts=dict.fromkeys(range(decoder.num_layers), experts),
        dense=(
            blocks.ends(hidden_size, decoder.vocab_size),
            *(
                blocks.pre_norm_layer(
                    index, attention, hidden_size, bias=attention_bias, output_bias=attention_bias
                )
                for index in range(decoder.num_layers)
            ),
        ),
        size_checks=(
            *mistral_format.size_checks(decoder),
            ("intermediate_size", inner_size, layout["gate"].name(0, 0), 0),
        ),
    )
    return mistral_format.rename(checkpoint, config, model) if checkpoint.in_mistral_format else model


def _with_window(attention: Attention, window: int | None) -> Attention:
    return replace(attention, window=window)


def _with_biases(layout: Layout) -> Layout:
    biases = {
        f"{weight}_bias": replace(pattern, tensor=pattern.tensor.removesuffix("weight") + "bias")
        for weight, pattern in layout.items()
    }
    return {**layout, **biases}
