"""Which versions compute the rows of a step, and the rows grouped by version.

The sequences of a step may be in several epochs. Where these have the same version in a slot, their rows form one group;
where they have different ones, each version has a group of its own. A step of one epoch groups its rows by slot.

Shapes: T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from router.dispatch.row_grouping import RowsBySlot
from router.gating.gate import NO_SLOT
from router.gating.model_view import ViewRows, rows_among


class StepVersions:
    """The versions of the epochs that a step computes in. Steps of the same epochs share one."""

    def __init__(self, views: Sequence[ViewRows]) -> None:
        """`views`: at least one, and of each epoch at least one."""
        by_epoch = {run.view.epoch.id: run.view.versions for run in views}
        self.epoch = ",".join(by_epoch)
        self._ids = tuple(by_epoch)
        self._versions = tuple(by_epoch.values())
        self._keys: dict[int, _LayerKeys] = {}

    def group(
        self, layer: int, slots: Tensor, views: Sequence[ViewRows], tokens: Sequence[int] | None
    ) -> tuple[RowsBySlot, list[bytes]]:
        """Groups the assignments of slots [T, K] on the CPU; the second result is the version of each group. `views`: which
        rows of the micro-batch are in which epoch. `tokens`: which of them these rows are; None: all."""
        if len(self._ids) == 1:
            groups = RowsBySlot.of(slots)
            versions = self._versions[0][layer]
            return groups, [versions[slot] for slot in groups.slots]
        keys = self._layer_keys(layer)
        groups = RowsBySlot.of(
            self._keyed(slots, keys, views if tokens is None else rows_among(views, tokens))
        )
        found = [keys.versions[key] for key in groups.slots]
        return replace(groups, slots=[slot for slot, _ in found]), [version for _, version in found]

    def _keyed(self, slots: Tensor, keys: _LayerKeys, views: Sequence[ViewRows]) -> Tensor:
        keyed = slots
        for run in views:
            table = keys.tables[self._ids.index(run.view.epoch.id)]
            if table is not None:
                keyed = slots.clone() if keyed is slots else keyed
                keyed[run.start : run.end] = table[slots[run.start : run.end] - NO_SLOT]
        return keyed

    def _layer_keys(self, layer: int) -> _LayerKeys:
        if layer not in self._keys:
            self._keys[layer] = _LayerKeys.of([versions[layer] for versions in self._versions])
        return self._keys[layer]


@dataclass(frozen=True, slots=True, eq=False)
class _LayerKeys:
    """A number for every version of a layer, the key by which rows are grouped."""

    # By key: slot and version.
    versions: Mapping[int, tuple[int, bytes]]
    # For each epoch: the key of every slot, behind that of NO_SLOT. None: the keys are the slots.
    tables: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, epochs: Sequence[Mapping[int, bytes]]) -> _LayerKeys:
        """A slot is the key of the version that the first epoch with this slot has there."""
        most = max((slot for versions in epochs for slot in versions), default=0)
        keys: dict[tuple[int, bytes], int] = {}
        taken: set[int] = set()
        tables = []
        for versions in epochs:
            for slot, version in versions.items():
                if (slot, version) not in keys:
                    keys[slot, version] = slot if slot not in taken else most + 1 + len(keys)
                    taken.add(slot)
            tables.append(_table(versions, keys, most))
        return cls({key: version for version, key in keys.items()}, tuple(tables))


def _table(versions: Mapping[int, bytes], keys: Mapping[tuple[int, bytes], int], most: int) -> Tensor | None:
    table = list(range(NO_SLOT, most + 1))
    for slot, version in versions.items():
        table[slot - NO_SLOT] = keys[slot, version]
    return None if table == list(range(NO_SLOT, most + 1)) else torch.tensor(table)
