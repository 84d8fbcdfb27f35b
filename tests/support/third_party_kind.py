"""A kind of expert as another package would bring it: `scale`, which multiplies every row by one vector.

Such a package names it in its pyproject.toml:

    [project.entry-points."moesaic.expert_kinds"]
    scale = "third_party_kind:ScaleKind"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor

from expert_worker.experts.expert import Expert, ExpertForm
from expert_worker.experts.kinds.kind import Weight, WeightSource
from expert_worker.experts.stack import Place
from moesaic.bundles import BundleExpert
from moesaic.bundles.kinds import GROUP
from moesaic.bundles.refusal import refuse
from moesaic.families.model import ExpertModule


@dataclass(frozen=True, slots=True)
class ScaleKind:
    """Experts with one weight, `scale` [D]."""

    name: ClassVar[str] = "scale"
    module: ClassVar[None] = None

    hidden_size: int
    times: int

    @classmethod
    def of(cls, expert: BundleExpert, base: ExpertModule) -> Self:
        times = expert.parameters.get("times", 1)
        if type(times) is not int or expert.parameters.keys() - {"times"}:
            refuse("KIND", f"layer {expert.layer}", "kind scale takes a whole number, times")
        return cls(base.hidden_size, times)

    @property
    def weights(self) -> Mapping[str, Weight]:
        return {"scale": Weight((self.hidden_size,))}

    def held_form(self, form: ExpertForm) -> ExpertForm:
        return ExpertForm(form.device, form.dtype)

    def held_bytes(self, form: ExpertForm) -> int:
        return self.hidden_size * form.dtype.itemsize

    def build(self, source: WeightSource, form: ExpertForm, place: Place) -> Expert:
        return ScaleExpert(source.tensor("scale").to(form.device, form.dtype) * self.times)


class ScaleExpert:
    """Maps rows [n, D] to rows [n, D]."""

    def __init__(self, scale: Tensor) -> None:
        self._scale = scale

    @property
    def device(self) -> torch.device:
        return self._scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self._scale.dtype

    @property
    def num_bytes(self) -> int:
        return self._scale.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype) * self._scale


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Installs the package for a while: importlib.metadata finds what is written into `folder`, as in site-packages."""
    info = folder / "third_party_kind-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-kind\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nscale = {__name__}:ScaleKind\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
