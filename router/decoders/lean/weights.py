"""The weights of the lean decoder. Each is brought into the layout of its use while it is read (see rotary.py), and
none is held twice.

Shapes: T tokens, D hidden size, F inner size, H query heads, G key/value heads, d head size, E slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.compute.elementwise import CUT_ELEMENTS
from moesaic.compute.linear import Linear
from moesaic.families.model import Attention, ExpertLayer, MoeModel
from router.attention.rotary import pairs_side_by_side
from router.attention.views import AttentionLayout
from router.decoders.dense_tensors import read_dense
from router.decoders.lean import supported as names
from router.gating.gate import Gate

# On any CPU, torch computes this number of elements, or a multiple of it, in whole vectors.
_VECTORS = 64


@dataclass(frozen=True, slots=True)
class Projections:
    """The projections of a layer to queries, keys and values, as one product."""

    weight: Linear  # D -> (H + 2 G) * d
    # The norms over each head, or over all heads of a token at once.
    query_norm: torch.Tensor | None  # [d] or [H * d]
    key_norm: torch.Tensor | None  # [d] or [G * d]

    def __call__(self, hidden: torch.Tensor, num_heads: int, head_dim: int, eps: float) -> torch.Tensor:
        """[T, D] -> [T, (H + 2 G) * d]: queries, keys, values."""
        rows = self.weight(hidden)
        if self.query_norm is not None and self.key_norm is not None:
            num_keys = (rows.shape[1] // head_dim - num_heads) // 2
            queries, keys, _ = rows.split([num_heads * head_dim, *[num_keys * head_dim] * 2], dim=1)
            for part, norm in ((queries, self.query_norm), (keys, self.key_norm)):
                normed = functional.rms_norm(part.unflatten(1, (-1, len(norm))), norm.shape, norm, eps)
                part.copy_(normed.flatten(1))
        return rows


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(silu(gate x) * up x): the MLP of a layer without experts, or the one that every token gets besides them."""

    gate_up: Linear  # D -> 2F: gate outputs before up outputs
    down: Linear  # F -> D
    # The score whose sigmoid weighs the output for each token.
    weight: Callable[[torch.Tensor], torch.Tensor] | None  # D -> 1
    # How many rows torch computes without splitting them among threads, which may change the last bits; None: all.
    rows_at_once: int | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D] in fresh memory."""
        gate_up = self.gate_up(hidden)
        parts = gate_up.split(self.rows_at_once or len(gate_up))
        activated = [functional.silu(gate).mul_(up) for gate, up in (part.chunk(2, dim=1) for part in parts)]
        output = self.down(activated[0] if len(activated) == 1 else torch.cat(activated))
        if self.weight is None:
            return output
        # Each score is repeated to whole vectors: the last bits of what does not fill one may differ.
        weights = self.weight(hidden).expand(-1, _VECTORS).contiguous().sigmoid()
        return output.mul_(weights[:, :1])


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: torch.Tensor  # [D]
    projections: Projections
    output: Linear  # H * d -> D
    experts_norm: torch.Tensor  # [D]
    # None: the layer has no experts, or a single one that takes every token.
    gate: Gate | None
    # The MLP that the router computes, if the layer has one.
    mlp: Mlp | None


class LayerReader:
    """Reads one layer after the other."""

    def __init__(self, checkpoint: Checkpoint, model: MoeModel, layout: AttentionLayout) -> None:
        self.num_bytes = 0
        self._checkpoint = checkpoint
        self._model = model
        self._layout = layout

    def layer(self, index: int) -> DecoderLayer:
        mixer = self._model.mixers[index]
        assert isinstance(mixer, Attention)
        prefix = names.layer_prefix(index)
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in self._read(*(n for n in self._model.dense if n.startswith(prefix))).items()
        }
        return DecoderLayer(
            attention_norm=tensors[names.ATTENTION_NORM],
            projections=self._projections(tensors, mixer.head_dim),
            output=self._linear(tensors[names.OUTPUT]),
            experts_norm=tensors[names.EXPERTS_NORM],
            gate=self._gate(tensors, self._model.experts.get(index)),
            mlp=self._mlp(tensors),
        )

    def ends(self) -> tuple[torch.Tensor, torch.Tensor, Linear]:
        """Embedding, last norm and head. A tied head is the tensor of the embedding, except where the product needs a
        layout of its own: then both forms are held, which costs memory and makes the head 1.6 to 4 times as fast."""
        tied = names.HEAD not in self._model.dense
        tensors = self._read(*{names.EMBEDDING, names.NORM, names.HEAD} & self._model.dense.keys())
        head = self._linear(tensors[names.EMBEDDING if tied else names.HEAD])
        if tied and self._layout.device.type == "cpu":
            self.num_bytes += head.num_bytes
        return tensors[names.EMBEDDING], tensors[names.NORM], head

    def _projections(self, tensors: dict[str, torch.Tensor], head_dim: int) -> Projections:
        queries, keys, values = names.PROJECTIONS

        def rows(kind: str) -> torch.Tensor | None:
            if f"{queries}.{kind}" not in tensors:
                return None
            turned = (pairs_side_by_side(tensors[f"{name}.{kind}"], head_dim) for name in (queries, keys))
            return torch.cat((*turned, tensors[f"{values}.{kind}"]))

        def norm(name: str) -> torch.Tensor | None:
            return pairs_side_by_side(tensors[name], head_dim) if name in tensors else None

        weight = rows("weight")
        assert weight is not None
        return Projections(self._linear(weight, rows("bias")), norm(names.QUERY_NORM), norm(names.KEY_NORM))

    def _gate(self, tensors: dict[str, torch.Tensor], experts: ExpertLayer | None) -> Gate | None:
        if experts is None or experts.gate is None:
            return None
        rows = tensors[names.GATE]
        return Gate(experts.gate, self._linear(rows) if self._layout.invariant else rows)

    def _mlp(self, tensors: dict[str, torch.Tensor]) -> Mlp | None:
        weights = names.MLP if names.MLP[0] in tensors else names.SHARED_MLP
        if weights[0] not in tensors:
            return None
        gate, up, down = (tensors[name] for name in weights)
        shared_gate = tensors.get(names.SHARED_GATE)
        return Mlp(
            self._linear(torch.cat((gate, up))),
            self._linear(down),
            None if shared_gate is None else self._small(shared_gate),
            max(1, CUT_ELEMENTS // len(gate)) if self._layout.invariant else None,
        )

    def _read(self, *wanted: str) -> dict[str, torch.Tensor]:
        layout = self._layout
        dense = {name: self._model.dense[name] for name in wanted}
        tensors = dict(read_dense(self._checkpoint, dense, dtype=layout.dtype, device=layout.device))
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        return Linear(weight, bias=bias, batch_invariant=self._layout.invariant)

    def _small(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """A product that is so small that a plain one is faster than a packed one."""
        return self._linear(weight) if self._layout.invariant else partial(functional.linear, weight=weight)
