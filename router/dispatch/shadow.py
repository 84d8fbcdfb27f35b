"""Shadowing: rows that another epoch's experts compute as well, and how their answers compare with those in use.

Shapes: n rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from router.gating.model_view import ModelView


@dataclass(frozen=True, slots=True)
class Shadow:
    """A share of the sequences of an epoch, by a hash of their ids, is also computed in another one, for comparison."""

    epoch: str
    view: ModelView
    share: float


@dataclass(slots=True, eq=False)
class ShadowTally:
    """How the answers of shadowed experts compare. Only the engine's thread writes it; any thread may read it."""

    rows: int = 0
    min_cosine: float = 1.0
    sum_cosine: float = 0.0
    max_difference: float = 0.0

    @property
    def mean_cosine(self) -> float:
        return self.sum_cosine / self.rows if self.rows else 0.0

    def compare(self, used: Tensor, shadow: Tensor) -> None:
        """Counts rows [n, D] in use and the shadow's answers for the same rows."""
        used, shadow = used.float(), shadow.float()
        cosines = torch.nn.functional.cosine_similarity(used, shadow)
        self.rows += len(used)
        self.min_cosine = min(self.min_cosine, float(cosines.min()))
        self.sum_cosine += float(cosines.sum())
        self.max_difference = max(self.max_difference, float((used - shadow).abs().max()))
