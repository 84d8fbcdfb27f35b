"""The description of a model on which router and workers agree: its mixers, gates, experts and tensors.

A family is data. This module defines the types of that data; each other module here describes one family in them.

Shapes: T tokens, D hidden size, F inner size, E slots of a layer, n rows, I inputs of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Groups:
    """The slots of a layer form `count` equal groups. A token may choose from `keep` of them: those with the largest sums
    of their `best` best scores."""

    count: int
    keep: int
    best: int


@dataclass(frozen=True, slots=True)
class GateRule:
    """How gate logits [T, E] become an assignment: `top_k` slots of each token, and their weights. The lowest slot wins
    ties, and everything is computed in float32. The steps, in order:

    1. `score` the logits over all slots.
    2. Choose by score (plus the selection bias, where the layer has one) inside the kept groups.
    3. `weight` the chosen slots: by their score, the softmax over their logits, the sigmoid of each logit, or the sparse
       mixer of Phi-MoE, which also makes the choice.
    4. `renormalise` the weights to a sum of one.
    5. Multiply by `scale`.

    `own`: the rule is not known here. The family keeps its own gate module of transformers, whose rows can be neither
    replaced nor extended; only `top_k` is known.
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "logit"] = "softmax"
    selection_bias: bool = False
    groups: Groups | None = None
    weight: Literal["score", "softmax", "sigmoid", "sparse_mixer"] = "score"
    renormalise: bool = False
    # Added to the sum by which weights are divided.
    epsilon: float = 0.0
    # Slots after the first are dropped where their weight is not above this; the other weights stay as they are.
    second_threshold: float | None = None
    scale: float = 1.0
    # What the weight multiplies: the output of the expert, or its input.
    weighs: Literal["output", "input"] = "output"
    # The sparse mixer excludes logits that lie further below the best one than twice this share of it.
    jitter: float = 0.0
    # Whether the gate adds a bias to its logits.
    biased: bool = False
    own: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many tokens a slot takes before it is full. Assignments beyond that are dropped, if capacities are in force.

    Tokens are counted over each `sequence` or over each step, in the latter case in runs of `group_size` tokens. They
    count in order or, if `batch_prioritised`, those with the higher score of their best slot first. All first choices are
    counted before any second ones: all of them or, if `count_kept_only`, those that were not dropped. If
    `renormalise_first`, weights are renormalised before tokens are dropped, and the remaining weights stay as they are.
    """

    # fixed: `amount` tokens. fraction: this share of the tokens. even: twice the even share of a slot. factor: `amount`
    # times the even share, but at least `min_tokens`.
    kind: Literal["fixed", "fraction", "even", "factor"]
    amount: float = 1.0
    min_tokens: int = 0
    counted: Literal["sequence", "step"] = "step"
    group_size: int | None = None
    batch_prioritised: bool = False
    count_kept_only: bool = False
    renormalise_first: bool = True

    def size(self, num_tokens: int, num_slots: int) -> int:
        """The capacity of a slot, where `num_tokens` are counted together."""
        match self.kind:
            case "fixed":
                return int(self.amount)
            case "fraction":
                return math.ceil(self.amount * num_tokens)
            case "even":
                return 2 * math.ceil(num_tokens / num_slots)
            case "factor":
                return max(min(num_tokens, int(num_tokens * self.amount / num_slots)), self.min_tokens)


# The activations of experts, by their names in configs; "clamped_swiglu" is that of gpt-oss.
ACTIVATIONS = (
    *("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2"),
    "clamped_swiglu",
)


@dataclass(frozen=True, slots=True)
class ExpertModule:
    """The function that an expert computes, [n, D] -> [n, D]: down(act(gate x) * up x) if gated, else down(act(up x)).

    The activation "clamped_swiglu" of gpt-oss limits gate to at most `limit` and up to [-limit, limit], and then gives
    (up + 1) * gate * sigmoid(1.702 gate).
    """

    hidden_size: int
    inner_size: int
    activation: str
    gated: bool = True
    biased: bool = False
    limit: float | None = None

    @property
    def kind(self) -> str:
        """What a version's digest says of the function."""
        kind = f"{'glu' if self.gated else 'mlp'} {self.activation}"
        return kind if self.limit is None else f"{kind} {self.limit}"

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of its weights, in the order in which they are hashed."""
        names = ("gate", "up", "down") if self.gated else ("up", "down")
        return (*names, *(f"{name}_bias" for name in names)) if self.biased else names

    def shape(self, weight: str) -> tuple[int, ...]:
        """[F, D] of gate and up, [D, F] of down, [F] or [D] of their biases."""
        size = (self.inner_size, self.hidden_size)
        if weight.removesuffix("_bias") == "down":
            size = size[::-1]
        return size[:1] if weight.endswith("_bias") else size

    @property
    def num_parameters(self) -> int:
        matrices = 3 if self.gated else 2
        biases = self.hidden_size + (matrices - 1) * self.inner_size
        return matrices * self.hidden_size * self.inner_size + (biases if self.biased else 0)


# plain: the dtype of computation. fp8_block: float8 with one factor, of any float type, for each block of 128 x 128.
# mxfp4: two 4-bit floats a byte, [..., I / 32, 16], with one power of two for each 32 of them.
Encoding = Literal["plain", "fp8_block", "mxfp4"]


@dataclass(frozen=True, slots=True)
class WeightPattern:
    """Where a checkpoint stores one weight of every slot of a layer.

    `tensor` is the name of the tensor, with {layer} and {slot}. `stacked`: one tensor holds all slots, [E, ...]. `part`
    (i, n): the weight is the i-th of n equal runs of the tensor's rows or, if `interleaved`, every n-th row from i on.
    `transposed`: the tensor is stored as [in, out], so parts are taken of columns. `scales` is the name of the tensor
    with the factors of an encoding; `tensor` then holds the encoded values, for mxfp4 the blocks.
    """

    tensor: str
    stacked: bool = False
    part: tuple[int, int] = (0, 1)
    interleaved: bool = False
    transposed: bool = False
    encoding: Encoding = "plain"
    scales: str | None = None

    def name(self, layer: int, slot: int) -> str:
        return self.tensor.format(layer=layer, slot=slot)

    def scales_name(self, layer: int, slot: int) -> str | None:
        return None if self.scales is None else self.scales.format(layer=layer, slot=slot)


# Where dense layers are computed. router: in the router. experts: by workers, as the one expert of their layer. auto:
# by workers if the model has no other experts, else in the router.
DenseLayers = Literal["auto", "router", "experts"]

# The pattern of every weight in `ExpertModule.weights`.
Layout = Mapping[str, WeightPattern]


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer. `gate` is None for a dense layer, whose one slot takes every token with weight one.

    `dtype` is that of the decoded weights. `parameters`, for a dense layer: the parameter of transformers that each weight
    becomes, with {layer}, if the router computes the layer itself.
    """

    num_slots: int
    module: ExpertModule
    layout: Layout
    dtype: str
    gate: GateRule | None
    parameters: Mapping[str, str] = field(default_factory=dict)
    # In force only if the router's settings ask for it, as it makes a token depend on its neighbours.
    capacity: Capacity | None = None

    @property
    def top_k(self) -> int:
        return 1 if self.gate is None else self.gate.top_k


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention over cached keys and values. A token attends to the last `window` tokens, itself included, or to
    the tokens before it in its own chunk of `chunk` positions; without either, to all tokens before it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None
    # Whether each head has a learned score that takes part in the softmax but has no value.
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Attention over one compressed vector per token, from which all heads derive keys and values (DeepSeek's MLA)."""

    num_heads: int
    latent_dim: int
    rotary_dim: int
    key_dim: int  # the size of a head's key without the rotary part
    value_dim: int


@dataclass(frozen=True, slots=True)
class Hyena:
    """A gated long convolution with a filter that is a sum of complex exponentials, `state_size` of them per channel."""

    state_size: int
    short_filter: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class EncoderAttention:
    """Attention of every token of a prompt to the whole prompt. Nothing is cached."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class DecoderAttention:
    """Causal attention over the start token and what the decoder has generated so far."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Attention of a decoder to the encoder's output for the prompt."""

    num_heads: int
    head_dim: int


Mixer = Attention | LatentAttention | Hyena | EncoderAttention | DecoderAttention | CrossAttention


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor that the router holds, and how it is read from the checkpoint.

    It is the tensor `source`, or its rows [first, end) if `rows` is set. `rotary_heads`: its rows belong to this number of
    heads in interleaved rotary order, and are reordered into halves. `scales`: the tensor with the factors, if it is
    stored as float8 in blocks (see Encoding).
    """

    shape: tuple[int, ...]
    source: str
    rows: tuple[int, int] | None = None
    rotary_heads: int | None = None
    scales: str | None = None


@dataclass(frozen=True, slots=True)
class MoeModel:
    """A model as its checkpoint describes it. In a dense model, each layer has one expert.

    `dtype` is the dtype in which the checkpoint computes. `experts` holds the layers whose experts workers serve. `dense`
    holds all other tensors, by the name of their parameter in transformers (for StripedHyena, in the authors' class).

    The first `num_encoder_layers` layers are the encoder, if there is one: it reads the prompt as a whole, and the other
    layers generate. `mixers` lists those of all layers, and then the cross-attentions of the decoder's layers.
    """

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    dtype: str
    mixers: tuple[Mixer, ...]
    experts: Mapping[int, ExpertLayer]
    dense: Mapping[str, DenseTensor]
    # The parameters that are one tensor, which `dense` holds under the first of the names, and those that the config takes
    # for copies of that tensor but that the files have with values of their own (see ties.py).
    ties: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    num_encoder_layers: int = 0
    # Tensors that the checkpoint may contain and that serving does not need.
    ignored: frozenset[str] = field(default_factory=frozenset)
    # The config from which transformers builds its modules, if that of the checkpoint is of another kind.
    transformers_config: Mapping[str, Any] | None = None

    def placing(self, dense_layers: DenseLayers) -> MoeModel:
        """The same model, with its dense layers computed where the setting says."""
        if dense_layers == "auto":
            dense_layers = (
                "router" if any(layer.gate is not None for layer in self.experts.values()) else "experts"
            )
        if dense_layers == "experts":
            return self
        kept = {layer: held for layer, held in self.experts.items() if held.gate is not None}
        moved = {
            held.parameters[weight].format(layer=layer): _as_dense(held, weight, layer)
            for layer, held in self.experts.items()
            if held.gate is None
            for weight in held.module.weights
        }
        return replace(self, experts=kept, dense={**self.dense, **moved})

    @property
    def tied(self) -> bool:
        """Whether parameters share a tensor."""
        return len(self.ties) > 1

    @property
    def addresses(self) -> tuple[ExpertAddress, ...]:
        """The addresses of all experts, in order of layer and slot."""
        return tuple(
            ExpertAddress(layer, slot)
            for layer, experts in sorted(self.experts.items())
            for slot in range(experts.num_slots)
        )

    @property
    def num_slots(self) -> dict[int, int]:
        """The number of slots of every layer that has experts."""
        return {layer: experts.num_slots for layer, experts in sorted(self.experts.items())}

    @property
    def num_dense_parameters(self) -> int:
        """The number of parameters that the router holds."""
        return sum(math.prod(tensor.shape) for tensor in self.dense.values())

    @property
    def num_parameters(self) -> int:
        return self.num_dense_parameters + sum(
            layer.num_slots * layer.module.num_parameters for layer in self.experts.values()
        )

    @property
    def num_active_parameters(self) -> int:
        """The number of parameters that compute a token."""
        return self.num_dense_parameters + sum(
            layer.top_k * layer.module.num_parameters for layer in self.experts.values()
        )

    def expert_bytes(self, layer: int) -> int:
        """The bytes of one expert of this layer, in the dtype of its weights."""
        experts = self.experts[layer]
        return experts.module.num_parameters * _ITEM_BYTES[experts.dtype]

    @property
    def expert_tensors(self) -> frozenset[str]:
        """The names of all tensors that hold expert weights. The router never reads them."""
        return frozenset(_expert_tensors(self.experts))

    def context_length(self, wanted: int | None) -> int:
        """The length of the longest sequence to serve. Raises InvalidArgument if it exceeds that of the model."""
        if wanted is not None and wanted > self.max_model_len:
            raise InvalidArgument(
                f"max_model_len: the model's context has {self.max_model_len} tokens", field="max_model_len"
            )
        return wanted or self.max_model_len


def _as_dense(held: ExpertLayer, weight: str, layer: int) -> DenseTensor:
    """One weight of a dense layer's only expert, as a tensor that the router holds."""
    pattern, shape = held.layout[weight], held.module.shape(weight)
    part, num_parts = pattern.part
    rows = None if num_parts == 1 else (part * shape[0], (part + 1) * shape[0])
    return DenseTensor(shape, pattern.name(layer, 0), rows, scales=pattern.scales_name(layer, 0))


def _expert_tensors(experts: Mapping[int, ExpertLayer]) -> Iterator[str]:
    for layer, held in experts.items():
        for pattern in held.layout.values():
            for slot in range(1 if pattern.stacked else held.num_slots):
                yield pattern.name(layer, slot)
                if (scales := pattern.scales_name(layer, slot)) is not None:
                    yield scales
