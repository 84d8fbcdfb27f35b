"""The weights of an encoder-decoder. Each is brought into the layout of its use while it is read, and none is held twice.

Shapes: D hidden size, F inner size, H heads, d head size, E slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.compute.linear import Linear
from moesaic.families.encoder_decoder import EncoderDecoderModel, StackNames
from router.attention.views import AttentionLayout
from router.decoders.dense_tensors import read_dense
from router.gating.gate import Gate

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    weight: torch.Tensor  # [D]
    # None: the norm does not subtract the mean (RMSNorm).
    bias: torch.Tensor | None
    eps: float

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True, eq=False)
class SelfAttention:
    norm: Norm
    projections: Linear  # D -> 3 * H * d: queries, keys, values
    output: Linear  # H * d -> D


@dataclass(frozen=True, slots=True, eq=False)
class CrossAttention:
    norm: Norm
    queries: Linear  # D -> H * d
    keys_values: Linear  # D -> 2 * H * d: keys, values, of the encoder's output
    output: Linear  # H * d -> D


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """down(act(up x))."""

    up: Linear  # D -> F
    down: Linear  # F -> D
    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D] in fresh memory."""
        return self.down(self.activation(self.up(hidden)))


@dataclass(frozen=True, slots=True, eq=False)
class SideLayer:
    attention: SelfAttention
    # None: the layer belongs to the encoder.
    cross: CrossAttention | None
    mlp_norm: Norm
    # Without a gate and an MLP, the layer has a single expert, which takes every token.
    gate: Gate | None
    mlp: Mlp | None


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The encoder or the decoder."""

    embedding: torch.Tensor  # [V, D]
    layers: tuple[SideLayer, ...]
    norm: Norm
    # [buckets, H], where positions are relative.
    relative_bias: torch.Tensor | None


class SideReader:
    """Reads one side after the other, layer by layer."""

    def __init__(self, checkpoint: Checkpoint, model: EncoderDecoderModel, layout: AttentionLayout) -> None:
        self.num_bytes = 0
        self._checkpoint = checkpoint
        self._model = model
        self._names = model.names
        self._arithmetic = model.arithmetic
        self._layout = layout
        self._embeddings = self._read_embeddings()

    def sides(self) -> tuple[Side, Side]:
        first = self._model.num_encoder_layers
        return (
            self._side(self._names.encoder, range(first)),
            self._side(self._names.decoder, range(first, self._model.num_layers)),
        )

    def head(self) -> Linear:
        """The head. A tied one is held in both forms where the product needs a layout of its own."""
        if self._names.head in self._model.dense:
            return Linear(self._read({self._names.head})[self._names.head])
        head = Linear(self._embeddings[self._names.shared])
        if self._layout.device.type == "cpu":
            self.num_bytes += head.num_bytes
        return head

    def _read_embeddings(self) -> Mapping[str, torch.Tensor]:
        names = self._names
        wanted = {names.shared, names.encoder.embedding, names.decoder.embedding}
        return self._read(wanted & self._model.dense.keys())

    def _side(self, names: StackNames, layers: range) -> Side:
        bias = None
        if self._arithmetic.relative is not None:
            name = names.block.format(block=0) + names.attention + self._names.relative_bias
            bias = self._read({name})[name]
        embedding = names.embedding if names.embedding in self._embeddings else self._names.shared
        ends = self._read(name for name in self._model.dense if name.startswith(f"{names.norm}."))
        return Side(
            self._embeddings[embedding],
            tuple(self._layer(names, layers.start, layer) for layer in layers),
            self._norm(ends, names.norm),
            bias,
        )

    def _layer(self, names: StackNames, first: int, layer: int) -> SideLayer:
        prefix = names.block.format(block=layer - first)
        wanted = [name for name in self._model.dense if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self._read(wanted).items()}
        queries, keys, values, output = self._names.projections
        attention = SelfAttention(
            self._norm(tensors, names.attention_norm),
            self._joined(tensors, names.attention, queries, keys, values),
            self._joined(tensors, names.attention, output),
        )
        cross = None
        if names.cross:
            cross = CrossAttention(
                self._norm(tensors, names.cross_norm),
                self._joined(tensors, names.cross, queries),
                self._joined(tensors, names.cross, keys, values),
                self._joined(tensors, names.cross, output),
            )
        return SideLayer(
            attention,
            cross,
            self._norm(tensors, names.mlp_norm),
            self._gate(layer, tensors, names.mlp + self._names.gate),
            None if layer in self._model.experts else self._mlp(tensors, names.mlp),
        )

    def _gate(self, layer: int, tensors: Mapping[str, torch.Tensor], name: str) -> Gate | None:
        experts = self._model.experts.get(layer)
        if experts is None or experts.gate is None:
            return None
        return Gate(experts.gate, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), exact=True)

    def _mlp(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> Mlp:
        return Mlp(
            self._joined(tensors, prefix, self._names.up),
            self._joined(tensors, prefix, self._names.down),
            _ACTIVATIONS[self._arithmetic.activation],
        )

    def _joined(self, tensors: Mapping[str, torch.Tensor], prefix: str, *names: str) -> Linear:
        """Joins several projections of the same input into one."""
        weights = [tensors[f"{prefix}{name}.weight"] for name in names]
        biases = [tensors[bias] for name in names if (bias := f"{prefix}{name}.bias") in tensors]
        return Linear(torch.cat(weights), bias=torch.cat(biases) if biases else None)

    def _norm(self, tensors: Mapping[str, torch.Tensor], name: str) -> Norm:
        return Norm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), self._arithmetic.norm_eps)

    def _read(self, wanted: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads tensors by name. Those of gates stay float32, as gates are computed in it."""
        layout = self._layout
        dense = {name: self._model.dense[name] for name in wanted}
        exact = {name for name in dense if f".{self._names.gate}." in name}
        tensors = dict(
            read_dense(self._checkpoint, dense, dtype=layout.dtype, device=layout.device, exact=exact)
        )
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return tensors
