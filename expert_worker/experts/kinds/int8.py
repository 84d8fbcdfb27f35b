"""The kind `int8`: an MLP whose matrices are stored as whole numbers from -127 to 127 with one scale per output.

A worker holds them as they are, in any form of its other experts: half of the bytes of bfloat16 on disk, on the way
and in memory. Parameters are those of `mlp`. Weights: `gate` [F, D] I8 with `gate_scales` [F] F32, and so on; biases
are floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from expert_worker.experts.expert import Expert, ExpertForm, assemble_expert, held_bytes
from expert_worker.experts.kinds.kind import Weight, WeightSource
from expert_worker.experts.loader import up_names
from expert_worker.experts.stack import Place
from moesaic.bundles.manifest import BundleExpert
from moesaic.bundles.version import mlp_module
from moesaic.compute.linear import Int8Weight, Linear
from moesaic.families.model import ExpertModule

_WHOLE = frozenset({"I8"})
_SCALES = frozenset({"F32"})


@dataclass(frozen=True, slots=True)
class Int8Kind:
    """An MLP with 8-bit weights. It lies in no stack, which holds floats."""

    name: ClassVar[str] = "int8"

    mlp: ExpertModule
    module: ClassVar[None] = None

    @classmethod
    def of(cls, expert: BundleExpert, base: ExpertModule) -> Self:
        return cls(mlp_module(expert, base.hidden_size))

    @property
    def weights(self) -> Mapping[str, Weight]:
        weights: dict[str, Weight] = {}
        for name in self.mlp.weights:
            shape = self.mlp.shape(name)
            if len(shape) == 1:
                weights[name] = Weight(shape)
            else:
                weights |= {name: Weight(shape, _WHOLE), f"{name}_scales": Weight(shape[:1], _SCALES)}
        return weights

    def held_form(self, form: ExpertForm) -> ExpertForm:
        return replace(form, weights="int8")

    def held_bytes(self, form: ExpertForm) -> int:
        return held_bytes(self.mlp, self.held_form(form))

    def build(self, source: WeightSource, form: ExpertForm, place: Place) -> Expert:
        up = self._linear(source, up_names(self.mlp), form)
        return assemble_expert(up, self._linear(source, ("down",), form), self.mlp, form)

    def _linear(self, source: WeightSource, names: tuple[str, ...], form: ExpertForm) -> Linear:
        def joined(end: str = "") -> Tensor:
            return torch.cat([source.tensor(f"{name}{end}") for name in names]).to(form.device)

        bias = joined("_bias").to(form.dtype) if self.mlp.biased else None
        weight = Int8Weight(joined(), joined("_scales"), form.dtype)
        return Linear(weight, "int8", bias, batch_invariant=form.batch_invariant)
