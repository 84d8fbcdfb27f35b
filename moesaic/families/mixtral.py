"""Mixtral in the layouts of transformers, which have separate or stacked experts, and in those of Mistral's releases."""

from __future__ import annotations

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks, mistral_format
from moesaic.families.config import Config
from moesaic.families.decoder import assemble, expert_layout, expert_size_checks, read_decoder, read_slots
from moesaic.families.model import DenseTensor, ExpertLayer, ExpertModule, GateRule, MoeModel

CLASSIC = blocks.separate(blocks.LAYER + "block_sparse_moe.experts.{slot}.", "w1", "w3", "w2")
CLASSIC_GATE = blocks.LAYER + "block_sparse_moe.gate.weight"
# The parameter of transformers; files with fused experts use this name too.
GATE = blocks.LAYER + "mlp.gate.weight"

# Each layout of experts, with the name of the gate that goes with it.
_LAYOUTS = ((CLASSIC, CLASSIC_GATE), (blocks.fused(blocks.LAYER + "mlp.experts."), GATE))
_MISTRAL_LAYOUTS = (
    (mistral_format.SEPARATE, mistral_format.SEPARATE_GATE),
    (mistral_format.STACKED, mistral_format.STACKED_GATE),
)


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    layouts = _MISTRAL_LAYOUTS if checkpoint.in_mistral_format else _LAYOUTS
    layout, dtype = expert_layout(checkpoint, (known for known, _ in layouts), layer=0)
    gate = next(name for known, name in layouts if known is layout)
    decoder = read_decoder(config)
    slots = read_slots(config, "num_local_experts", "num_experts")
    module = ExpertModule(
        decoder.hidden_size, config.size("intermediate_size"), config.choice("hidden_act", ("silu",))
    )
    attention = blocks.read_attention(
        config, decoder.hidden_size, window=config.optional_size("sliding_window")
    )
    experts = ExpertLayer(slots.count, module, layout, dtype, GateRule(slots.top_k, renormalise=True))

    def layer(index: int) -> blocks.Named:
        yield from blocks.pre_norm_layer(index, attention, decoder.hidden_size)
        shape = (slots.count, decoder.hidden_size)
        yield GATE.format(layer=index), DenseTensor(shape, gate.format(layer=index))

    model = assemble(
        checkpoint,
        config,
        decoder,
        family="mixtral",
        mixers=(attention,) * decoder.num_layers,
        experts=dict.fromkeys(range(decoder.num_layers), experts),
        dense=(
            blocks.ends(decoder.hidden_size, decoder.vocab_size),
            *(layer(index) for index in range(decoder.num_layers)),
        ),
        size_checks=(
            *mistral_format.size_checks(decoder),
            *expert_size_checks(0, experts, slots, gate, "intermediate_size"),
        ),
    )
    return mistral_format.rename(checkpoint, config, model) if checkpoint.in_mistral_format else model


def published_name(parameter: str) -> str:
    """The published name of a parameter of transformers; only that of the gate differs."""
    return parameter.replace(".mlp.gate.", ".block_sparse_moe.gate.")
