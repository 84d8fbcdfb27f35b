"""What a model is, as far as router and workers must agree on it: its mixers, its gates, its experts, its tensors.

A family is data. These are the words that it is said in; the other modules here say it, one a family.
"""

# Shapes: D hidden size, F inner size, E slots of a layer, V vocabulary, H query heads, G key/value heads, d head size.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Groups:
    """Slots come in `count` equal groups, of which `keep` may be chosen from: those with the largest sums of their
    `best` best scores."""

    count: int
    keep: int
    best: int


@dataclass(frozen=True, slots=True)
class GateRule:
    """How gate logits [T, E] become an assignment: `top_k` slots of each token, and their weights. The lowest slot wins
    ties, and all of it is float32. In this order:

    `score` of the logits over all slots; choice by score (plus the selection bias, where the layer has one) inside the
    kept groups; `weight` of the chosen ones: their score, the softmax over their logits, the sigmoid of each one's logit,
    or the sparse mixer of Phi-MoE (which chooses, too); `renormalise` to a sum of one; times `scale`.

    `own`: none of this is known of the family, its own gate module of transformers decides; only `top_k` is told.
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "logit"] = "softmax"
    selection_bias: bool = False
    groups: Groups | None = None
    weight: Literal["score", "softmax", "sigmoid", "sparse_mixer"] = "score"
    renormalise: bool = False
    # Added to the sum that divides.
    epsilon: float = 0.0
    # Slots behind the first are left out where their weight is not above this; nothing makes up for it.
    least_second: float | None = None
    scale: float = 1.0
    # Where the weight goes: onto what the expert answers, or onto what it is asked.
    weighs: Literal["output", "input"] = "output"
    # Logits further below the best than twice this share of it are left out by the sparse mixer.
    jitter: float = 0.0
    # Whether the gate adds a bias to its logits.
    biased: bool = False
    own: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many tokens a slot takes before it is full, where that is wanted: what an assignment has beyond it is dropped.

    Tokens are counted over each `sequence` or over each step, there in runs of `group` tokens; in order, or with
    `by_score` those first whose best slot has the higher score. All first choices are counted before any second: all
    there are, or with `kept_only` those that found a place. `share_first`: weights that are renormalised are so before
    tokens are dropped, and what is left is not made up for.
    """

    # fixed: `amount` tokens. fraction: that share of the tokens. even: twice what each slot has where all have alike.
    # factor: `amount` times that, but `least`.
    kind: Literal["fixed", "fraction", "even", "factor"]
    amount: float = 1.0
    least: int = 0
    counted: Literal["sequence", "step"] = "step"
    group: int | None = None
    by_score: bool = False
    kept_only: bool = False
    share_first: bool = True

    def size(self, num_tokens: int, num_slots: int) -> int:
        """Of a slot, where so many tokens are counted together."""
        match self.kind:
            case "fixed":
                return int(self.amount)
            case "fraction":
                return math.ceil(self.amount * num_tokens)
            case "even":
                return 2 * math.ceil(num_tokens / num_slots)
            case "factor":
                return max(min(num_tokens, int(num_tokens * self.amount / num_slots)), self.least)


# Activations of experts, by the names that configs use; "clamped_swiglu" is that of gpt-oss.
ACTIVATIONS = (
    *("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2"),
    "clamped_swiglu",
)


@dataclass(frozen=True, slots=True)
class ExpertModule:
    """What one expert computes, [n, D] -> [n, D]. Gated: down(act(gate x) * up x), else down(act(up x)).

    `activation` "clamped_swiglu" is that of gpt-oss: gate at most `limit`, up within it, then
    (up + 1) * gate * sigmoid(1.702 gate).
    """

    hidden_size: int
    inner_size: int
    activation: str
    gated: bool = True
    biased: bool = False
    limit: float | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of its weights, in the order in which they are hashed."""
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


# plain: as it is computed. fp8_block: float8 with one factor a block of 128 x 128, of any float type. mxfp4: two 4-bit
# floats a byte, [..., I / 32, 16], with one power of two for 32 of them.
Encoding = Literal["plain", "fp8_block", "mxfp4"]


@dataclass(frozen=True, slots=True)
class WeightPattern:
    """Where one weight lies for every slot of a layer.

    `tensor` names it, with {layer} and {slot}. `stacked`: one tensor holds all slots, [E, ...]. `part` (i, n): of the
    weight's rows it is the i-th of n equal runs, or with `interleaved` every n-th row from i on. `transposed`: stored
    as [in, out], so the parts are of columns. `scales` names the factors of an encoding, for mxfp4 beside `tensor`
    that holds the blocks.
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


# Where dense layers are computed. router: in the router; experts: by workers, as the one expert of their layer. auto:
# experts in a model that has no others, else router.
DenseLayers = Literal["auto", "router", "experts"]

# One pattern for every name in `ExpertModule.weights`.
Layout = Mapping[str, WeightPattern]


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer. `gate` None: a dense layer, one slot that takes every token with weight one.

    `dtype` is that of the weights on disk, once they are decoded. `parameters` of a dense layer: the parameter of
    transformers that each weight is, with {layer}, where the router computes the layer itself.
    """

    num_slots: int
    module: ExpertModule
    layout: Layout
    dtype: str
    gate: GateRule | None
    parameters: Mapping[str, str] = field(default_factory=dict)
    # In force only where the router is told so: it makes a token depend on its neighbours.
    capacity: Capacity | None = None

    @property
    def top_k(self) -> int:
        return 1 if self.gate is None else self.gate.top_k


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention over cached keys and values. A token sees `window` tokens, its own included, or the tokens
    of its own chunk of `chunk` positions; None: all before it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None
    # Whether each head has a learned score that takes part in the softmax and adds nothing.
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Attention over one compressed vector a token, of which all heads make their keys and values (DeepSeek's MLA)."""

    num_heads: int
    latent_dim: int
    rotary_dim: int
    key_dim: int  # of a head, without the rotary part
    value_dim: int


@dataclass(frozen=True, slots=True)
class Hyena:
    """A gated long convolution by a sum of complex exponentials. `state_size` of them a channel."""

    state_size: int
    short_filter: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class EncoderAttention:
    """Attention of every token of a prompt over all of it. Nothing is kept."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class DecoderAttention:
    """Attention over what a decoder has generated so far, which begins with a token of its own."""

    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Attention of a decoder over what its encoder made of the prompt."""

    num_heads: int
    head_dim: int


Mixer = Attention | LatentAttention | Hyena | EncoderAttention | DecoderAttention | CrossAttention


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor that the router holds, and how it comes out of the checkpoint.

    `rows` [first, end) of tensor `source`. `rotary_heads`: its rows are those of so many heads in interleaved rotary
    order and are put into half order. `scales`: it is float8 in blocks (see Encoding).
    """

    shape: tuple[int, ...]
    source: str
    rows: tuple[int, int] | None = None
    rotary_heads: int | None = None
    scales: str | None = None


@dataclass(frozen=True, slots=True)
class MoeModel:
    """A model as its checkpoint describes it. A dense model is the case of one expert a layer.

    `dtype` is what the checkpoint computes in. `experts` has the layers whose experts are served by workers. `dense`
    has all other tensors, by the name of the parameter of transformers that each is (StripedHyena: its own names).

    The first `num_encoder_layers` layers, if there are any, are an encoder: it reads the prompt as a whole, and the
    other layers generate. Behind the mixers of all layers come the cross-attentions of the latter.
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
    tied: bool = False
    num_encoder_layers: int = 0
    # Tensors that may be in the checkpoint and have no part in serving.
    ignored: frozenset[str] = field(default_factory=frozenset)
    # The config by which transformers builds its modules, where the checkpoint's own is of another kind.
    transformers_config: Mapping[str, Any] | None = None

    def placing(self, dense_layers: DenseLayers) -> MoeModel:
        """The same model with its dense layers where they are wanted."""
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
    def addresses(self) -> tuple[ExpertAddress, ...]:
        """All experts, in order of layer and slot."""
        return tuple(
            ExpertAddress(layer, slot)
            for layer, experts in sorted(self.experts.items())
            for slot in range(experts.num_slots)
        )

    @property
    def num_slots(self) -> dict[int, int]:
        """Slots of every layer that has experts."""
        return {layer: experts.num_slots for layer, experts in sorted(self.experts.items())}

    @property
    def num_dense_parameters(self) -> int:
        """Those that the router holds."""
        return sum(math.prod(tensor.shape) for tensor in self.dense.values())

    @property
    def num_parameters(self) -> int:
        return self.num_dense_parameters + sum(
            layer.num_slots * layer.module.num_parameters for layer in self.experts.values()
        )

    @property
    def num_active_parameters(self) -> int:
        """Of these, the ones that a token meets."""
        return self.num_dense_parameters + sum(
            layer.top_k * layer.module.num_parameters for layer in self.experts.values()
        )

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one expert of this layer in the dtype of its weights."""
        experts = self.experts[layer]
        return experts.module.num_parameters * ITEM_BYTES[experts.dtype]

    @property
    def expert_tensors(self) -> frozenset[str]:
        """Names of all tensors that hold expert weights; the router never reads them."""
        return frozenset(_expert_tensors(self.experts))

    def context_length(self, wanted: int | None) -> int:
        """The longest sequence to serve. Raises InvalidArgument for more than the model was made for."""
        if wanted is not None and wanted > self.max_model_len:
            raise InvalidArgument(
                f"max_model_len: the model's context has {self.max_model_len} tokens", field="max_model_len"
            )
        return wanted or self.max_model_len


def _as_dense(held: ExpertLayer, weight: str, layer: int) -> DenseTensor:
    """A weight of a dense layer's only expert, as a tensor of the router."""
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
