"""How alike two ways of computing a model are: log probabilities of the same tokens, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Likeness:
    """Differences of log probabilities, in nats, over the same tokens; `perplexity_ratio` is the second over the first."""

    mean_error: float
    largest_error: float
    perplexity_ratio: float

    @property
    def cells(self) -> tuple[str, str, str]:
        return f"{self.mean_error:.2g}", f"{self.largest_error:.2g}", f"{self.perplexity_ratio:.4f}"


def compare_scores(exact: Sequence[float], other: Sequence[float]) -> Likeness:
    errors = [abs(a - b) for a, b in zip(exact, other, strict=True)]
    gain = (sum(exact) - sum(other)) / len(exact)
    return Likeness(sum(errors) / len(errors), max(errors), math.exp(gain))
