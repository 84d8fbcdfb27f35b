"""The common parts of encoder-decoder families: a stack of layers that reads the prompt, a stack that generates, and an
MLP or experts in each layer of both. The layers of the encoder come first.

Shapes: d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.families.blocks import Named, mapping, tensor
from moesaic.families.config import Config
from moesaic.families.model import (
    Capacity,
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
    ExpertLayer,
    ExpertModule,
    GateRule,
    Layout,
    MoeModel,
    WeightPattern,
)
from moesaic.families.tensor_check import check_num_layers, check_sizes, stored_dtype

# The activations that an MLP may have; all published models use relu.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")


@dataclass(frozen=True, slots=True)
class StackNames:
    """The names of the modules of one side. `block` has {block} and precedes the others; the names of attentions and of
    the MLP end with a dot. `embedding` is the name of the side's own embedding, which it need not have."""

    block: str
    attention: str
    attention_norm: str
    mlp: str
    mlp_norm: str
    norm: str
    embedding: str
    cross: str = ""
    cross_norm: str = ""


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a family's tensors. `projections` are those of queries, keys, values and the output."""

    encoder: StackNames
    decoder: StackNames
    shared: str
    head: str
    # The parameters that a config ties to `shared`, in the order in which transformers does.
    tied: tuple[str, str, str]
    projections: tuple[str, str, str, str]
    up: str
    down: str
    gate: str = "router.classifier"
    # The bias in the first block of each side, below its attention.
    relative_bias: str = "relative_attention_bias.weight"
    # Buffers that some files contain; they are computed, never read.
    computed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RelativePositions:
    """A learned bias of each head for the distance between key and query: one for each short distance, then one for each
    of ever wider buckets, and the same for all distances from `max_distance` on."""

    num_buckets: int
    max_distance: int


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The constants of the forward pass."""

    norm_eps: float
    # Whether norms subtract the mean and add a bias.
    centred: bool
    # The token with which the decoder begins.
    start_token: int
    embedding_scale: float
    logits_scale: float
    # The bias of scores by distance. None: scores are divided by the root of d, and positions are added to embeddings.
    relative: RelativePositions | None
    # The token that has no position and is not counted.
    padding_token: int
    # The activation of the MLPs.
    activation: str


@dataclass(frozen=True, slots=True)
class Stack:
    """The sizes of one side. `sparse` says of each layer whether it has several experts."""

    num_heads: int
    head_dim: int
    inner_size: int
    sparse: tuple[bool, ...]

    @property
    def num_layers(self) -> int:
        return len(self.sparse)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the whole model, and the config keys of the numbers of layers."""

    hidden_size: int
    vocab_size: int
    max_model_len: int
    num_slots: int
    encoder: Stack
    decoder: Stack
    tied: bool
    encoder_key: str
    decoder_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderModel(MoeModel):
    """A MoeModel with an encoder, and what its decoder needs to know beyond tensors."""

    names: Names
    arithmetic: Arithmetic


def assemble(
    checkpoint: Checkpoint,
    config: Config,
    sizes: Sizes,
    names: Names,
    arithmetic: Arithmetic,
    *,
    family: str,
    gate: GateRule,
    capacity: Capacity,
) -> EncoderDecoderModel:
    """Builds the model of these parts, after a check of the sizes that its config states."""
    sides = (
        _Side(sizes.encoder, names.encoder, 0, sizes.encoder_key),
        _Side(sizes.decoder, names.decoder, sizes.encoder.num_layers, sizes.decoder_key),
    )
    _check_sizes(checkpoint, config, sides, sizes, names)
    experts = {
        layer: held
        for side in sides
        for layer, held in _expert_layers(checkpoint, side, sizes, names, arithmetic, gate, capacity)
    }
    encoder, decoder = sizes.encoder, sizes.decoder
    return EncoderDecoderModel(
        names=names,
        arithmetic=arithmetic,
        family=family,
        num_layers=encoder.num_layers + decoder.num_layers,
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        max_model_len=sizes.max_model_len,
        dtype=experts[0].dtype,
        mixers=(
            *(EncoderAttention(encoder.num_heads, encoder.head_dim),) * encoder.num_layers,
            *(DecoderAttention(decoder.num_heads, decoder.head_dim),) * decoder.num_layers,
            *(CrossAttention(decoder.num_heads, decoder.head_dim),) * decoder.num_layers,
        ),
        experts=experts,
        dense=mapping(
            _ends(checkpoint, sizes, names),
            *(_side_tensors(side, sizes, names, arithmetic, gate) for side in sides),
        ),
        ties=(names.shared, *names.tied) if sizes.tied else (),
        num_encoder_layers=encoder.num_layers,
        ignored=_copies(checkpoint, sizes, names) | frozenset(names.computed),
    )


@dataclass(frozen=True, slots=True)
class _Side:
    """The sizes and names of one side. Its layers are numbered from `first` on; the config key `key` is their number."""

    stack: Stack
    names: StackNames
    first: int
    key: str

    def mlp(self, block: int) -> str:
        return self.names.block.format(block=block) + self.names.mlp


def _check_sizes(
    checkpoint: Checkpoint, config: Config, sides: tuple[_Side, ...], sizes: Sizes, names: Names
) -> None:
    gates = (
        ("num_experts", sizes.num_slots, f"{side.mlp(block)}{names.gate}.weight", 0)
        for side in sides
        for block, sparse in enumerate(side.stack.sparse)
        if sparse
    )
    ends = (
        ("vocab_size", sizes.vocab_size, names.shared, 0),
        ("d_model", sizes.hidden_size, names.shared, 1),
    )
    check_sizes(checkpoint, config, (*ends, *gates))
    for side in sides:
        prefix = side.names.block.replace("{block}", "{layer}")
        check_num_layers(checkpoint, config, side.key, side.stack.num_layers, prefix)


def _expert_layers(
    checkpoint: Checkpoint,
    side: _Side,
    sizes: Sizes,
    names: Names,
    arithmetic: Arithmetic,
    gate: GateRule,
    capacity: Capacity,
) -> Iterator[tuple[int, ExpertLayer]]:
    biased = arithmetic.centred
    module = ExpertModule(
        sizes.hidden_size, side.stack.inner_size, arithmetic.activation, gated=False, biased=biased
    )
    for block, sparse in enumerate(side.stack.sparse):
        layer = side.first + block
        layout = _mlp(side.mlp(block) + ("experts.expert_{slot}." if sparse else ""), names, biased=biased)
        yield (
            layer,
            ExpertLayer(
                num_slots=sizes.num_slots if sparse else 1,
                module=module,
                layout=layout,
                dtype=stored_dtype(checkpoint, layout["up"].name(layer, 0)),
                gate=gate if sparse else None,
                parameters={} if sparse else {weight: pattern.tensor for weight, pattern in layout.items()},
                capacity=capacity if sparse else None,
            ),
        )


def _side_tensors(side: _Side, sizes: Sizes, names: Names, arithmetic: Arithmetic, gate: GateRule) -> Named:
    """The tensors of one side that the router holds."""
    biased, stack = arithmetic.centred, side.stack
    yield from _norm(side.names.norm, sizes.hidden_size, biased=biased)
    if arithmetic.relative is not None:
        first = side.names.block.format(block=0) + side.names.attention
        yield tensor(first + names.relative_bias, arithmetic.relative.num_buckets, stack.num_heads)
    for block, sparse in enumerate(stack.sparse):
        prefix = side.names.block.format(block=block)
        yield from _block(prefix, side.names, names, stack, sizes, biased=biased)
        if sparse:
            name = side.mlp(block) + names.gate
            yield from _linear(name, sizes.num_slots, sizes.hidden_size, biased=gate.biased)


def read_start_token(config: Config, vocab_size: int, default: int) -> int:
    token = config.count("decoder_start_token_id", default=default)
    if token >= vocab_size:
        config.fail("decoder_start_token_id", f"must be below vocab_size, {vocab_size}")
    return token


def _ends(checkpoint: Checkpoint, sizes: Sizes, names: Names) -> Named:
    """The embeddings and the head. Untied sides share one embedding, unless two are stored."""
    shape = (sizes.vocab_size, sizes.hidden_size)
    separate = [
        name for name in (names.encoder.embedding, names.decoder.embedding) if name in checkpoint.tensors
    ]
    if sizes.tied:
        embeddings = [names.shared, names.encoder.embedding, names.decoder.embedding]
    else:
        embeddings = [names.shared] if len(separate) < 2 else separate
    for name in (*embeddings, names.head):
        yield tensor(name, *shape)


def _copies(checkpoint: Checkpoint, sizes: Sizes, names: Names) -> frozenset[str]:
    """The embeddings that are copies of one that is read."""
    embeddings = {names.shared, names.encoder.embedding, names.decoder.embedding}
    read = {name for name, _ in _ends(checkpoint, sizes, names)}
    return frozenset(embeddings - read)


def _block(
    prefix: str, stack_names: StackNames, names: Names, stack: Stack, sizes: Sizes, *, biased: bool
) -> Named:
    """The tensors of a layer without those of its MLP."""
    size, inner = sizes.hidden_size, stack.num_heads * stack.head_dim
    attentions = [(stack_names.attention, stack_names.attention_norm)]
    if stack_names.cross:
        attentions.append((stack_names.cross, stack_names.cross_norm))
    for attention, norm in attentions:
        *heads, output = names.projections
        for name in heads:
            yield from _linear(prefix + attention + name, inner, size, biased=biased)
        yield from _linear(prefix + attention + output, size, inner, biased=biased)
        yield from _norm(prefix + norm, size, biased=biased)
    yield from _norm(prefix + stack_names.mlp_norm, size, biased=biased)


def _linear(name: str, num_rows: int, num_columns: int, *, biased: bool) -> Named:
    yield tensor(f"{name}.weight", num_rows, num_columns)
    if biased:
        yield tensor(f"{name}.bias", num_rows)


def _norm(name: str, size: int, *, biased: bool) -> Named:
    yield tensor(f"{name}.weight", size)
    if biased:
        yield tensor(f"{name}.bias", size)


def _mlp(prefix: str, names: Names, *, biased: bool) -> Layout:
    parts = (("", "weight"), ("_bias", "bias")) if biased else (("", "weight"),)
    return {
        weight + ending: WeightPattern(f"{prefix}{name}.{kind}")
        for ending, kind in parts
        for weight, name in (("up", names.up), ("down", names.down))
    }
