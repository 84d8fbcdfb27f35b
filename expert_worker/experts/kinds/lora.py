"""The kind `lora`: an expert of the model with low-rank changes, so that a small bundle makes a new one of an old one.

Every matrix W [O, I] of the base slot that has factors becomes W + alpha / rank * B A, once, when the expert is
loaded; what is computed then is an MLP as any other. Parameters: `base_slot`, a slot of the model in the same layer;
`base_version`, the digest of what the factors were trained on; `rank`; `alpha` (default: rank). Weights: `gate_a`
[R, I] and `gate_b` [O, R], and so on for `up` and `down`; a matrix without factors stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from expert_worker.experts.expert import Expert, ExpertForm, ExpertWeights, held_bytes, make_expert
from expert_worker.experts.kinds.kind import Weight, WeightSource
from expert_worker.experts.loader import up_names
from expert_worker.experts.stack import Place
from moesaic.bundles.manifest import BundleExpert
from moesaic.bundles.refusal import refuse
from moesaic.families.model import ExpertModule

_PARAMETERS = frozenset({"base_slot", "base_version", "rank", "alpha"})
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LoraKind:
    """One expert of the model, plus the products of factors."""

    name: ClassVar[str] = "lora"

    module: ExpertModule
    base_slot: int
    base_version: bytes
    rank: int
    alpha: float
    # The matrices that have factors.
    changed: tuple[str, ...]

    @classmethod
    def of(cls, expert: BundleExpert, base: ExpertModule) -> Self:
        where, given = f"layer {expert.layer}", expert.parameters
        if unknown := sorted(given.keys() - _PARAMETERS):
            refuse("KIND", where, f"kind lora has no parameter {unknown[0]}")
        slot, rank, version = given.get("base_slot"), given.get("rank"), given.get("base_version")
        if type(slot) is not int or slot < 0:
            refuse("KIND", where, "base_slot: must be a slot of the model")
        if type(rank) is not int or not 1 <= rank <= min(base.hidden_size, base.inner_size):
            refuse("KIND", where, "rank: must be a whole number from 1 to the smaller size of the matrices")
        if not isinstance(version, str) or not _DIGEST.fullmatch(version):
            refuse("KIND", where, "base_version: must be the digest of the base slot's version, in hex")
        alpha = given.get("alpha", rank)
        if isinstance(alpha, bool | str):
            refuse("KIND", where, "alpha: must be a number")
        matrices = (*up_names(base), "down")
        changed = tuple(name for name in matrices if expert.weights.keys() & {f"{name}_a", f"{name}_b"})
        return cls(base, slot, bytes.fromhex(version), rank, float(alpha), changed)

    @property
    def weights(self) -> Mapping[str, Weight]:
        sizes = {name: self.module.shape(name) for name in self.changed}
        return {
            factor: Weight(shape)
            for name, (outputs, inputs) in sizes.items()
            for factor, shape in ((f"{name}_a", (self.rank, inputs)), (f"{name}_b", (outputs, self.rank)))
        }

    def held_form(self, form: ExpertForm) -> ExpertForm:
        return form

    def held_bytes(self, form: ExpertForm) -> int:
        return held_bytes(self.module, form)

    def build(self, source: WeightSource, form: ExpertForm, place: Place) -> Expert:
        merged = source.base_weights(self.base_slot, self.base_version)
        of_name = dict(
            zip(up_names(self.module), merged.up.chunk(len(up_names(self.module))), strict=True),
            down=merged.down,
        )
        for name in self.changed:
            factors = (source.tensor(f"{name}_{factor}").float() for factor in "ba")
            of_name[name].add_(torch.matmul(*factors), alpha=self.alpha / self.rank)
        return make_expert(_moved(merged, place.memory(self.module, form)), self.module, form, place.row)


def _moved(weights: ExpertWeights, memory: ExpertWeights) -> ExpertWeights:
    """The weights in memory of the form in which they are computed."""
    memory.up.copy_(weights.up)
    memory.down.copy_(weights.down)
    for target, bias in ((memory.up_bias, weights.up_bias), (memory.down_bias, weights.down_bias)):
        if target is not None and bias is not None:
            target.copy_(bias)
    return memory
