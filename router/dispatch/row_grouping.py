"""The rows of a layer grouped by slot, and what each worker gets of them.

The code uses numpy, because every step here is tiny and an operation of torch costs several times as much,
and for a single token plain lists, which cost a fraction of numpy's.

Shapes: T tokens, K experts per token, n assignments and R tokens of one worker. An assignment is a pair of a
token and a rank, numbered token * K + rank. A group is the assignments of one slot, or of one of its versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from router.gating.gate import NO_SLOT

Indices = npt.NDArray[np.int64]


class WorkerRows(NamedTuple):
    """The rows of one worker: the assignments of some groups, and the tokens that are sent for them."""

    # Indices of the groups in their `RowsBySlot`, ascending.
    groups: Sequence[int]
    # The slot of each group.
    slots: Sequence[int]
    # The number of assignments of each group.
    counts: Sequence[int]
    # Group by group, which of the tokens that are sent each assignment belongs to.
    hidden_rows: list[int]  # [n]
    assignments: Indices | list[int]  # [n], group by group
    tokens: Indices | None  # [R], ascending; None: all tokens
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class RowsBySlot:
    """The groups of a layer: the slots that are used and the assignments of each, both ascending. A slot that a step uses in
    several versions occurs once for each of them (step_versions.py)."""

    slots: Sequence[int]
    assignments: Indices | list[int]  # group by group: all T * K except those to no slot
    unassigned: Indices | list[int]  # the assignments to no slot
    # Where the assignments of each group begin, and where those of the last one end.
    edges: Sequence[int]
    num_tokens: int
    num_ranks: int

    @classmethod
    def of(cls, slots: Tensor) -> RowsBySlot:
        """Groups the assignments of slots [T, K] on the CPU; a rank without a slot has NO_SLOT."""
        num_tokens, num_ranks = slots.shape
        if num_tokens == 1:
            return cls._of_token(*slots.tolist())
        # Shifted so that NO_SLOT is zero and sorts first.
        flat = slots.numpy().ravel() - NO_SLOT
        counts = np.bincount(flat, minlength=1)
        num_unassigned = int(counts[0])
        counts[0] = 0
        used = counts.nonzero()[0]
        order = flat.argsort(kind="stable")
        return cls(
            slots=(used + NO_SLOT).tolist(),
            assignments=order[num_unassigned:],
            unassigned=order[:num_unassigned],
            edges=[0, *counts[used].cumsum().tolist()],
            num_tokens=num_tokens,
            num_ranks=num_ranks,
        )

    @classmethod
    def _of_token(cls, slots: list[int]) -> RowsBySlot:
        """Groups the assignments of a single token, which are its ranks."""
        order = sorted(range(len(slots)), key=slots.__getitem__)
        num_unassigned = slots.count(NO_SLOT)
        ranks = order[num_unassigned:]
        used: list[int] = []
        edges: list[int] = []
        for i, rank in enumerate(ranks):
            if not used or slots[rank] != used[-1]:
                used.append(slots[rank])
                edges.append(i)
        edges.append(len(ranks))
        return cls(used, ranks, order[:num_unassigned], edges, num_tokens=1, num_ranks=len(slots))

    def worker_rows(self, groups: Sequence[int]) -> WorkerRows:
        """The rows of a worker that computes these groups, which ascend."""
        slots, edges = self.slots, self.edges
        chosen = [slots[group] for group in groups]
        counts = [edges[group + 1] - edges[group] for group in groups]
        if isinstance(self.assignments, list):
            ranks = [rank for group in groups for rank in self.assignments[edges[group] : edges[group + 1]]]
            return WorkerRows(groups, chosen, counts, [0] * len(ranks), ranks, None, 1)
        tokens: Indices | None = None
        if len(groups) == len(slots) and not len(self.unassigned):
            assignments = self.assignments
            rows = assignments // self.num_ranks
        else:
            assignments = np.concatenate([self.assignments_of(group) for group in groups])
            tokens, rows = _needed(assignments // self.num_ranks, self.num_tokens)
        num_tokens = self.num_tokens if tokens is None else len(tokens)
        return WorkerRows(groups, chosen, counts, rows.tolist(), assignments, tokens, num_tokens)

    def assignments_of(self, group: int) -> Indices | list[int]:
        """The assignments of one group."""
        return self.assignments[self.edges[group] : self.edges[group + 1]]

    def tokens_of(self, group: int) -> list[int]:
        """The tokens of one group."""
        return [int(assignment) // self.num_ranks for assignment in self.assignments_of(group)]


def _needed(tokens: Indices, num_tokens: int) -> tuple[Indices | None, Indices]:
    """The distinct tokens, None for all there are, and the index of each of `tokens` among them."""
    wanted = np.zeros(num_tokens, dtype=bool)
    wanted[tokens] = True
    if wanted.all():
        return None, tokens
    return wanted.nonzero()[0], (wanted.cumsum() - 1)[tokens]
