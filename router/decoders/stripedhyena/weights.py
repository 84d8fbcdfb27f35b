"""The weights of a StripedHyena. Each is brought into the layout of its use while it is read, and none is held twice.

Rows are reordered where that makes them simpler to use: rotary pairs lie side by side (see rotary.py), and the channels of
a Hyena are ordered by role instead of by head.

Shapes: D hidden size, F inner size, H query heads, G key/value heads, d head size, S modes, K taps of the short filter,
V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.compute.linear import Linear
from moesaic.families import stripedhyena as names
from moesaic.families.model import Attention, Hyena
from moesaic.families.stripedhyena import StripedHyenaModel
from router.attention.rotary import pairs_side_by_side
from router.attention.views import AttentionLayout
from router.decoders.dense_tensors import read_dense
from router.decoders.stripedhyena.filters import LongFilter, ShortFilter, by_role, complex_of
from router.decoders.stripedhyena.mixers import AttentionMixer, HyenaMixer, SequenceMixer
from router.phase_clock import PhaseClock

log = logging.getLogger(__name__)

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
}
# These are float32 in every file, and here too, whatever dtype the model computes in.
_EXACT = ("poles", "residues")


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """down(act(gate x) * up x)."""

    gate_up: Linear  # D -> 2F: gate outputs before up outputs
    down: Linear  # F -> D
    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D] in fresh memory."""
        gate, up = self.gate_up(hidden).chunk(2, dim=1)
        return self.down(self.activation(gate).mul_(up))


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    pre_norm: torch.Tensor  # [D]
    mixer: SequenceMixer
    output: Linear  # D -> D
    post_norm: torch.Tensor  # [D]
    # None: workers compute the MLP, as the one expert of the layer.
    mlp: Mlp | None


class BlockReader:
    """Reads one block after the other."""

    def __init__(
        self, checkpoint: Checkpoint, model: StripedHyenaModel, layout: AttentionLayout, clock: PhaseClock
    ) -> None:
        self.num_bytes = 0
        self._checkpoint = checkpoint
        self._model = model
        self._arithmetic = model.arithmetic
        self._layout = layout
        self._clock = clock

    def block(self, layer: int) -> Block:
        prefix = names.BLOCK.format(layer=layer)
        wanted = [name for name in self._model.dense if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self._read(*wanted).items()}
        mixer = self._model.mixers[layer]
        if isinstance(mixer, Attention):
            output = "inner_mha_cls.out_proj"
            mixes: SequenceMixer = self._attention(layer, mixer, tensors)
        else:
            assert isinstance(mixer, Hyena)
            output = "out_filter_dense"
            mixes = self._hyena(layer, mixer, tensors)
        return Block(
            pre_norm=tensors["pre_norm.scale"],
            mixer=mixes,
            output=Linear(tensors[f"{output}.weight"], bias=tensors.get(f"{output}.bias")),
            post_norm=tensors["post_norm.scale"],
            mlp=None if layer in self._model.experts else self._mlp(tensors),
        )

    def ends(self) -> tuple[torch.Tensor, torch.Tensor, Linear]:
        """Embedding, last norm and head. A tied head is held in both forms where the product needs a layout of its own."""
        tied = names.HEAD not in self._model.dense
        tensors = self._read(*{names.EMBEDDING, names.NORM, names.HEAD} & self._model.dense.keys())
        head = Linear(tensors[names.EMBEDDING if tied else names.HEAD])
        if tied and self._layout.device.type == "cpu":
            self.num_bytes += head.num_bytes
        return tensors[names.EMBEDDING], tensors[names.NORM], head

    def _attention(self, layer: int, shape: Attention, tensors: dict[str, torch.Tensor]) -> AttentionMixer:
        turned = (shape.num_heads + shape.num_kv_heads) * shape.head_dim

        def in_pairs(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat((pairs_side_by_side(rows[:turned], shape.head_dim), rows[turned:]))

        bias = tensors.get("inner_mha_cls.Wqkv.bias")
        projections = Linear(
            in_pairs(tensors["inner_mha_cls.Wqkv.weight"]), bias=None if bias is None else in_pairs(bias)
        )
        return AttentionMixer(layer, shape, projections, self._clock)

    def _hyena(self, layer: int, shape: Hyena, tensors: dict[str, torch.Tensor]) -> HyenaMixer:
        def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
            return by_role(rows, shape.num_heads) if self._arithmetic.split_by_head else rows

        short_bias = tensors.get("filter.short_filter_bias")
        poles, residues = (complex_of(tensors[f"filter.{name}"]) for name in _EXACT)
        if poles.abs().max() > 1:
            log.warning("a state grows with every token", extra={"fields": {"layer": layer}})
        long = LongFilter(poles, residues, tensors["filter.D"].float())
        # The poles and residues were already counted when they were read.
        self.num_bytes += long.num_bytes - poles.nbytes - residues.nbytes
        return HyenaMixer(
            layer=layer,
            projections=Linear(
                sorted_rows(tensors["projections.weight"]), bias=sorted_rows(tensors["projections.bias"])
            ),
            short=ShortFilter(
                weight=sorted_rows(tensors["filter.short_filter_weight"])[:, 0].t().float().contiguous(),
                bias=None if short_bias is None else sorted_rows(short_bias).float(),
            ),
            long=long,
            clock=self._clock,
        )

    def _mlp(self, tensors: dict[str, torch.Tensor]) -> Mlp:
        gate, up, down = (tensors[names.MLP[weight]] for weight in ("gate", "up", "down"))
        activation = _ACTIVATIONS[self._arithmetic.activation]
        return Mlp(Linear(torch.cat((gate, up))), Linear(down), activation)

    def _read(self, *wanted: str) -> dict[str, torch.Tensor]:
        layout = self._layout
        dense = {name: self._model.dense[name] for name in wanted}
        exact = {name for name in wanted if name.endswith(_EXACT)}
        tensors = dict(
            read_dense(self._checkpoint, dense, dtype=layout.dtype, device=layout.device, exact=exact)
        )
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return tensors
