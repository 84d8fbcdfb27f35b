"""GraniteMoE: the experts of a layer are in two stacked tensors, and weighed by the softmax over the chosen ones alone.

The family's multipliers of embeddings, attention, residuals and logits are applied by the modules in the router.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.decoder import assemble, expert_layout, expert_size_checks, read_decoder, read_slots
from moesaic.families.model import (
    DenseTensor,
    ExpertLayer,
    ExpertModule,
    GateRule,
    Layout,
    MoeModel,
    WeightPattern,
)

_BLOCK = blocks.LAYER + "block_sparse_moe."
_GATE = _BLOCK + "router.weight"
_PUBLISHED: Layout = {
    "gate": WeightPattern(_BLOCK + "input_linear.weight", stacked=True, part=(0, 2)),
    "up": WeightPattern(_BLOCK + "input_linear.weight", stacked=True, part=(1, 2)),
    "down": WeightPattern(_BLOCK + "output_linear.weight", stacked=True),
}
_FUSED = blocks.fused(_BLOCK + "experts.")
_GATES = ((_PUBLISHED, _BLOCK + "router.layer.weight"), (_FUSED, _GATE))


def describe(checkpoint: Checkpoint, config: Config) -> MoeModel:
    decoder = read_decoder(config)
    hidden_size = decoder.hidden_size
    attention = blocks.read_attention(config, hidden_size)
    slots = read_slots(config, "num_local_experts")
    layout, dtype = expert_layout(checkpoint, (_PUBLISHED, _FUSED), 0)
    gate = next(name for known, name in _GATES if known is layout)
    module = ExpertModule(
        hidden_size, config.size("intermediate_size"), config.choice("hidden_act", ("silu",))
    )
    rule = GateRule(slots.top_k, score="logit", weight="softmax")
    experts = ExpertLayer(slots.count, module, layout, dtype, rule)
    bias = config.flag("attention_bias")

    def layer_tensors(layer: int) -> blocks.Named:
        yield from blocks.pre_norm_layer(layer, attention, hidden_size, bias=bias, output_bias=bias)
        source = gate.format(layer=layer)
        yield _GATE.format(layer=layer), DenseTensor((slots.count, hidden_size), source)

    def dense() -> Iterator[blocks.Named]:
        yield blocks.ends(hidden_size, decoder.vocab_size)
        yield from (layer_tensors(layer) for layer in range(decoder.num_layers))

    return assemble(
        checkpoint,
        config,
        decoder,
        family="granitemoe",
        mixers=(attention,) * decoder.num_layers,
        experts=dict.fromkeys(range(decoder.num_layers), experts),
        dense=dense(),
        size_checks=expert_size_checks(0, experts, slots, gate, "intermediate_size"),
    )
