"""The common parts of decoder-only families: their sizes, which layers have experts, and the assembly of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.mistral_params import MAX_LAYERS
from moesaic.families import blocks
from moesaic.families.config import Config
from moesaic.families.model import ExpertLayer, ExpertModule, GateRule, Layout, Mixer, MoeModel
from moesaic.families.quantisation import decoded_dtype
from moesaic.families.tensor_check import check_num_layers, check_sizes, find_layout

# The names of experts in many families, as stored separately and as joined by transformers.
MLP = blocks.LAYER + "mlp."
MLP_LAYOUTS = (
    blocks.separate(MLP + "experts.{slot}.", "gate_proj", "up_proj", "down_proj"),
    blocks.fused(MLP + "experts."),
)

# No layer has more slots. The bound exists because the tensors of all slots are listed one by one.
MAX_SLOTS = 1 << 12

# A config key, the size that follows from it, a tensor, and the dimension of the tensor that must have this size.
SizeCheck = tuple[str, int, str, int]


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """The sizes of the model as a whole."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Slots:
    """The number of experts of a layer, the number of them per token, and the config key of the former."""

    count: int
    top_k: int
    key: str


@dataclass(frozen=True, slots=True)
class Channels:
    """The channel mixers of all layers: the layers in `sparse` have a gate and experts of one `module`, the others have a
    gated MLP."""

    slots: Slots
    sparse: frozenset[int]
    module: ExpertModule
    layers: Mapping[int, ExpertLayer]
    size_checks: tuple[SizeCheck, ...]


def read_decoder(config: Config) -> DecoderSizes:
    return DecoderSizes(
        num_layers=config.size("num_hidden_layers", most=MAX_LAYERS),
        hidden_size=config.size("hidden_size"),
        vocab_size=config.size("vocab_size"),
        max_model_len=_context(config, config.size("max_position_embeddings")),
        tied=config.flag("tie_word_embeddings", default=False),
    )


def _context(config: Config, max_model_len: int) -> int:
    """Limits the context to the length of the original training. Beyond it, the positions of all tokens of a batch would
    change as soon as one sequence exceeds that length."""
    values = config.values.get("rope_parameters") or config.values.get("rope_scaling")
    if not isinstance(values, Mapping) or "longrope" not in (values.get("rope_type"), values.get("type")):
        return max_model_len
    original = values.get("original_max_position_embeddings")
    if original is None:
        original = config.values.get("original_max_position_embeddings")
    if type(original) is not int or original < 1:
        config.fail("original_max_position_embeddings", "must be a whole number above zero")
    return min(original, max_model_len)


def read_slots(config: Config, *keys: str) -> Slots:
    """`keys` are the spellings of the number of experts."""
    key = config.first_present(keys)
    count, top_k = config.size(key, most=MAX_SLOTS), config.size("num_experts_per_tok")
    if top_k > count:
        config.fail("num_experts_per_tok", f"must be at most {key}, {count}")
    return Slots(count, top_k, key)


def read_layer_types(config: Config, num_layers: int, *served: str) -> tuple[str, ...] | None:
    """The kind of each layer's mixer, or None if the config leaves it to the family. Refuses kinds that are not `served`."""
    kinds = config.values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        config.fail("layer_types", f"must be a list of num_hidden_layers, {num_layers}, words")
    if unknown := [kind for kind in kinds if kind not in served]:
        config.fail("layer_types", f"{str(unknown[0])[:64]!r} is not served; served: {', '.join(served)}")
    return tuple(kinds)


def read_num_predictors(config: Config) -> int:
    """The number of layers after the last one that predict further tokens. Serving does not use them."""
    return config.count("num_nextn_predict_layers", "num_mtp_layers", default=0, most=MAX_LAYERS)


def layers_behind_dense(config: Config, num_layers: int) -> frozenset[int]:
    """The layers that have experts, in a model whose first few layers are dense."""
    first = config.count("first_k_dense_replace")
    if first >= num_layers:
        config.fail("first_k_dense_replace", f"leaves none of {num_layers} layers with experts")
    return frozenset(range(first, num_layers))


def expert_layout(checkpoint: Checkpoint, layouts: Iterable[Layout], layer: int) -> tuple[Layout, str]:
    """The first of the layouts that the checkpoint has, and the dtype of its decoded weights."""
    layout = find_layout(checkpoint, layouts, layer)
    first = next(iter(layout.values()))
    return layout, decoded_dtype(checkpoint, first.name(layer, 0))


def dense_layer(prefix: str, module: ExpertModule, dtype: str) -> ExpertLayer:
    """A dense layer, whose gated MLP is its only expert; `prefix` has {layer} and ends with a dot."""
    parameters = {weight: f"{prefix}{weight}_proj.weight" for weight in module.weights}
    return ExpertLayer(1, module, blocks.dense_layout(prefix), dtype, None, parameters)


def read_channels(
    checkpoint: Checkpoint,
    config: Config,
    decoder: DecoderSizes,
    slots: Slots,
    rule: GateRule,
    sparse: frozenset[int],
) -> Channels:
    """The channel mixers, under the names that most families use. `sparse` are the layers that have experts."""
    first = min(sparse)
    layout, dtype = expert_layout(checkpoint, MLP_LAYOUTS, first)
    activation = config.choice("hidden_act", ("silu",))
    module = ExpertModule(decoder.hidden_size, config.size("moe_intermediate_size"), activation)
    experts = ExpertLayer(slots.count, module, layout, dtype, rule)
    mlp = ExpertModule(decoder.hidden_size, config.size("intermediate_size"), activation)
    dense = dense_layer(MLP, mlp, dtype)
    return Channels(
        slots,
        sparse,
        module,
        {layer: experts if layer in sparse else dense for layer in range(decoder.num_layers)},
        tuple(expert_size_checks(first, experts, slots, MLP + "gate.weight", "moe_intermediate_size")),
    )


def expert_size_checks(
    layer: int, experts: ExpertLayer, slots: Slots, gate: str, inner_key: str
) -> Iterator[SizeCheck]:
    """The tensors of one layer that show the number of slots and the width of each; `gate` has {layer}."""
    first = next(iter(experts.layout.values()))
    rows = experts.module.inner_size * first.part[1]
    yield slots.key, slots.count, gate.format(layer=layer), 0
    yield inner_key, rows, first.name(layer, 0), -1 if first.transposed else int(first.stacked)


def assemble(
    checkpoint: Checkpoint,
    config: Config,
    decoder: DecoderSizes,
    *,
    family: str,
    mixers: tuple[Mixer, ...],
    experts: Mapping[int, ExpertLayer],
    dense: Iterable[blocks.Named],
    size_checks: Iterable[SizeCheck],
    num_predictors: int = 0,
) -> MoeModel:
    """Builds the model of these parts, after a check of the sizes that its config states."""
    sizes: tuple[SizeCheck, ...] = (
        ("vocab_size", decoder.vocab_size, blocks.EMBEDDING, 0),
        ("hidden_size", decoder.hidden_size, blocks.EMBEDDING, 1),
    )
    check_sizes(checkpoint, config, (*sizes, *size_checks))
    end = decoder.num_layers + num_predictors
    check_num_layers(checkpoint, config, "num_hidden_layers", end, blocks.LAYER)
    beyond = tuple(blocks.LAYER.format(layer=layer) for layer in range(decoder.num_layers, end))
    return MoeModel(
        family=family,
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        max_model_len=decoder.max_model_len,
        dtype=next(iter(experts.values())).dtype,
        mixers=mixers,
        experts=experts,
        dense=blocks.mapping(*dense),
        ties=(blocks.EMBEDDING, blocks.HEAD) if decoder.tied else (),
        ignored=frozenset(name for name in checkpoint.tensors if name.startswith(beyond)),
    )
