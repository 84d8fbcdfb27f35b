"""The slots of a layer that nobody computes at the moment, and what some rows of a step do about it.

Either the next-ranked slots take their place, or they are left out and the weights of the others grow. A token whose choice
is not touched gets the bits of the full answer. Where nothing would be left of a token's experts, its choice stays as it is,
and the dispatch finds that one is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moesaic.expert_policy import OnMissing

StandIn = Literal["substitute", "renormalise"]


def stand_in_of(on_missing: OnMissing) -> StandIn | None:
    """How an answer goes on without an expert; None where it does not."""
    return on_missing if on_missing in ("substitute", "renormalise") else None


@dataclass(frozen=True, slots=True, eq=False)
class Absence:
    """Of one chunk, so that its tally counts that chunk alone."""

    # By layer; only layers that lack a slot.
    slots: Mapping[int, frozenset[int]]
    stand_in: StandIn
    # By layer: the chosen (token, slot) pairs that were substituted or left out; filled in by the forward pass.
    tally: dict[int, int] = field(default_factory=dict)

    @property
    def num_affected(self) -> int:
        return sum(self.tally.values())
