"""The assignments of a layer in the order in which experts want them: slot by slot.

numpy, because every step here is tiny and an operation of torch costs several times as much; and for a single token plain
lists, which cost a fraction of numpy's.
"""

# Shapes: T tokens, K experts per token, n assignments and R tokens of one worker. An assignment is one (token, rank) pair,
# numbered token * K + rank.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from router.gating.gate import NO_SLOT

Indices = npt.NDArray[np.int64]


class Part(NamedTuple):
    """What one worker is asked: the assignments of some slots, and the tokens that have to be sent for them."""

    # Of the slots, in their order.
    places: Sequence[int]
    slots: Sequence[int]
    # How many assignments each slot has.
    counts: Sequence[int]
    # Slot by slot, which of the tokens that are sent.
    rows: list[int]
    assignments: Indices | list[int]  # [n], slot by slot
    tokens: Indices | None  # [R], ascending; None: all of them
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class SlotOrder:
    """Which slots are used, ascending, and the assignments of each, ascending too."""

    slots: Sequence[int]
    assignments: Indices | list[int]  # slot by slot: all T * K but the empty ones
    empty: Indices | list[int]  # those to no slot
    # Where the assignments of each slot begin, and where the last ones end.
    edges: Sequence[int]
    num_tokens: int
    num_ranks: int

    @classmethod
    def of(cls, slots: Tensor) -> SlotOrder:
        """slots [T, K] on the CPU; NO_SLOT where there is none."""
        num_tokens, num_ranks = slots.shape
        if num_tokens == 1:
            return cls._of_token(*slots.tolist())
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

    @classmethod
    def _of_token(cls, slots: list[int]) -> SlotOrder:
        """Of a single token: its assignments are its ranks."""
        order = sorted(range(len(slots)), key=slots.__getitem__)
        num_empty = slots.count(NO_SLOT)
        ranks = order[num_empty:]
        used: list[int] = []
        edges: list[int] = []
        for i, rank in enumerate(ranks):
            if not used or slots[rank] != used[-1]:
                used.append(slots[rank])
                edges.append(i)
        edges.append(len(ranks))
        return cls(used, ranks, order[:num_empty], edges, num_tokens=1, num_ranks=len(slots))

    def part(self, places: Sequence[int]) -> Part:
        """Some of `slots`, named by their places there, ascending."""
        slots, edges = self.slots, self.edges
        chosen = [slots[place] for place in places]
        counts = [edges[place + 1] - edges[place] for place in places]
        if isinstance(self.assignments, list):
            ranks = [rank for place in places for rank in self.assignments[edges[place] : edges[place + 1]]]
            return Part(places, chosen, counts, [0] * len(ranks), ranks, None, 1)
        tokens: Indices | None = None
        if len(places) == len(slots):
            assignments = self.assignments
            rows = assignments // self.num_ranks
        else:
            assignments = np.concatenate([self.assignments_of(place) for place in places])
            tokens, rows = _needed(assignments // self.num_ranks, self.num_tokens)
        num_tokens = self.num_tokens if tokens is None else len(tokens)
        return Part(places, chosen, counts, rows.tolist(), assignments, tokens, num_tokens)

    def assignments_of(self, place: int) -> Indices | list[int]:
        """Those of one of `slots`."""
        return self.assignments[self.edges[place] : self.edges[place + 1]]

    def tokens_of(self, place: int) -> list[int]:
        """The tokens of one of `slots`."""
        return [int(assignment) // self.num_ranks for assignment in self.assignments_of(place)]


def _needed(tokens: Indices, num_tokens: int) -> tuple[Indices | None, Indices]:
    """The distinct ones among `tokens`, None for all there are; and where each of `tokens` is among them."""
    wanted = np.zeros(num_tokens, dtype=bool)
    wanted[tokens] = True
    if wanted.all():
        return None, tokens
    return wanted.nonzero()[0], (wanted.cumsum() - 1)[tokens]
