"""The kind `mlp`: gated or plain, with or without biases; all that ExpertModule describes, of any inner size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from expert_worker.experts.expert import Expert, ExpertForm, held_bytes
from expert_worker.experts.kinds.kind import Weight, WeightSource
from expert_worker.experts.loader import build_mlp
from expert_worker.experts.stack import Place
from moesaic.bundles.manifest import BundleExpert
from moesaic.bundles.version import mlp_module
from moesaic.families.model import ExpertModule


@dataclass(frozen=True, slots=True)
class MlpKind:
    """An MLP with float weights."""

    name: ClassVar[str] = "mlp"

    module: ExpertModule

    @classmethod
    def of(cls, expert: BundleExpert, base: ExpertModule) -> Self:
        return cls(mlp_module(expert, base.hidden_size))

    @property
    def weights(self) -> Mapping[str, Weight]:
        return {name: Weight(self.module.shape(name)) for name in self.module.weights}

    def held_form(self, form: ExpertForm) -> ExpertForm:
        return form

    def held_bytes(self, form: ExpertForm) -> int:
        return held_bytes(self.module, form)

    def build(self, source: WeightSource, form: ExpertForm, place: Place) -> Expert:
        return build_mlp(source, self.module, form, place, source.scratch)
