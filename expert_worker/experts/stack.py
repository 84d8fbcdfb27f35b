"""Stacks: the weights of several experts of a layer behind one another, which one grouped kernel computes.

A stack has rows to spare, so that a version that is loaded later lies beside the others and is computed with them.
A row is free again when the expert in it is gone, which is when the last call that began with it has ended.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass

from expert_worker.experts.expert import ExpertForm, ExpertWeights, StackRow, can_stack, empty_weights
from moesaic.families.model import ExpertModule


class ExpertStack:
    """The rows of one stack. Rows may be taken by one thread at a time; they come back on any."""

    def __init__(self, module: ExpertModule, form: ExpertForm, num_rows: int) -> None:
        self.module = module
        self._weights = empty_weights(module, form, num_rows)
        self._num_rows = num_rows
        self._free = list(reversed(range(num_rows)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def is_empty(self) -> bool:
        return self.num_free == self._num_rows

    def take(self) -> StackRow:
        """A free row, for as long as somebody holds what is returned. Raises IndexError without a free one."""
        index = self._free.pop()
        row = StackRow(self._weights, index)
        weakref.finalize(row, self._free.append, index).atexit = False
        return row


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert will lie: in a row of a stack, or in memory of its own."""

    row: StackRow | None = None

    def memory(self, module: ExpertModule, form: ExpertForm) -> ExpertWeights:
        """The memory for its weights."""
        return empty_weights(module, form) if self.row is None else self.row.weights


class ExpertStacks:
    """The stacks of a worker, by layer. Where nothing can be stacked, every place is memory of its own.

    Its methods are called by one thread at a time; rows come back on any."""

    def __init__(self, form: ExpertForm, spare_rows: int = 0) -> None:
        self._form = form
        self._spare_rows = spare_rows
        self._stacks: defaultdict[int, list[ExpertStack]] = defaultdict(list)

    def reserve(self, layer: int, module: ExpertModule, count: int) -> None:
        """Makes room for `count` more experts of this module in a layer, in one stack if no row is free."""
        if can_stack(self._form, module) and (missing := count - self.num_free(layer, module)) > 0:
            spare = 0 if self._stacks[layer] else self._spare_rows
            self._stacks[layer].append(ExpertStack(module, self._form, missing + spare))

    def place(self, layer: int, module: ExpertModule | None) -> Place:
        """A reserved place; without a module, or without a free row, in memory of its own."""
        for stack in self._stacks[layer]:
            if stack.module == module and stack.num_free:
                return Place(stack.take())
        return Place()

    def drop_empty(self) -> None:
        """Gives up the memory of stacks that were made for versions which are gone; the first of a layer stays."""
        for layer, stacks in self._stacks.items():
            self._stacks[layer] = stacks[:1] + [stack for stack in stacks[1:] if not stack.is_empty]

    def num_free(self, layer: int, module: ExpertModule) -> int:
        """How many more experts of this module find room in a layer without memory of their own."""
        return sum(stack.num_free for stack in self._stacks[layer] if stack.module == module)
