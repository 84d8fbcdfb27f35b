"""The assignments of a layer in the order in which experts want them: slot by slot.

numpy, because every step here is tiny and an operation of torch costs several times as much.
"""

# Shapes: T tokens, K experts per token, n assignments and R tokens of one worker. An assignment is one (token, rank) pair,
# numbered token * K + rank.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from router.gate import NO_SLOT

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one worker is asked: the assignments of some slots, and the tokens that have to be sent for them."""

    # Of the slots, in their order.
    places: Sequence[int]
    slots: Sequence[int]
    # How many assignments each slot has.
    counts: Sequence[int]
    # Slot by slot, which of the tokens that are sent.
    rows: list[int]
    assignments: Indices  # [n], slot by slot
    tokens: Indices | None  # [R], ascending; None: all of them
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class SlotOrder:
    """Which slots are used, ascending, and the assignments of each, ascending too."""

    slots: Sequence[int]
    assignments: Indices  # slot by slot: all T * K but the empty ones
    empty: Indices  # those to no slot
    # Where the assignments of each slot begin, and where the last ones end.
    edges: Sequence[int]
    num_tokens: int
    num_ranks: int

    @classmethod
    def of(cls, slots: Tensor) -> SlotOrder:
        """slots [T, K] on the CPU; NO_SLOT where there is none."""
        num_tokens, num_ranks = slots.shape
        # Counted from no slot at all, which comes first.
        flat = slots.numpy().ravel() - NO_SLOT
        counts = np.bincount(flat, minlength=1)
        num_empty = int(counts[0])
        counts[0] = 0
        used = counts.nonzero()[0]
        order = flat.argsort(kind="stable")
        return cls(
            slots=(used + NO_SLOT).tolist(),
            assignments=order[num_empty:],
            empty=order[:num_empty],
            edges=[0, *counts[used].cumsum().tolist()],
            num_tokens=num_tokens,
            num_ranks=num_ranks,
        )

    def part(self, places: Sequence[int]) -> Part:
        """Some of `slots`, named by their places there, ascending."""
        tokens: Indices | None = None
        if len(places) == len(self.slots):
            assignments = self.assignments
            rows = assignments // self.num_ranks
        else:
            assignments = np.concatenate([self.assignments_of(place) for place in places])
            tokens, rows = _needed(assignments // self.num_ranks, self.num_tokens)
        return Part(
            places=places,
            slots=[self.slots[place] for place in places],
            counts=[self.edges[place + 1] - self.edges[place] for place in places],
            rows=rows.tolist(),
            assignments=assignments,
            tokens=tokens,
            num_tokens=self.num_tokens if tokens is None else len(tokens),
        )

    def assignments_of(self, place: int) -> Indices:
        """Those of one of `slots`."""
        return self.assignments[self.edges[place] : self.edges[place + 1]]

    def tokens_of(self, place: int) -> list[int]:
        """The tokens of one of `slots`."""
        tokens: list[int] = (self.assignments_of(place) // self.num_ranks).tolist()
        return tokens


def _needed(tokens: Indices, num_tokens: int) -> tuple[Indices | None, Indices]:
    """The distinct ones among `tokens`, None for all there are; and where each of `tokens` is among them."""
    wanted = np.zeros(num_tokens, dtype=bool)
    wanted[tokens] = True
    if wanted.all():
        return None, tokens
    return wanted.nonzero()[0], (wanted.cumsum() - 1)[tokens]
