"""How alike two ways of computing a model are: their tokens, log probabilities and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.result import Table


@dataclass(frozen=True, slots=True)
class Likeness:
    """Differences of log probabilities, in nats; `perplexity_ratio` is that of the second over the first."""

    mean_error: float
    largest_error: float
    perplexity_ratio: float


def compare_scores(exact: Sequence[float], other: Sequence[float]) -> Likeness:
    errors = [abs(a - b) for a, b in zip(exact, other, strict=True)]
    gain = (sum(exact) - sum(other)) / len(exact)
    return Likeness(sum(errors) / len(errors), max(errors), math.exp(gain))


def likeness_table(title: str, subject: str, found: Sequence[tuple[str, Likeness]]) -> Table:
    return Table(
        title,
        (subject, "mean error", "largest", "perplexity ratio"),
        tuple(
            (name, f"{each.mean_error:.2g}", f"{each.largest_error:.2g}", f"{each.perplexity_ratio:.4f}")
            for name, each in found
        ),
    )


def same_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of equal tokens, from the first on, over the length that both sides wrote."""
    pairs = [
        mine == other
        for of_ours, of_theirs in zip(ours, theirs, strict=True)
        for mine, other in zip(of_ours, of_theirs, strict=False)
    ]
    return sum(pairs) / len(pairs)
