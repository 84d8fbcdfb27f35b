"""The model as one sequence sees it: an epoch, and what the sequence's policy leaves of it.

A step may run sequences of several views. Everything here is plain data; gate.py makes products and indices of it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from moesaic.epoch import Epoch, GateRow
from moesaic.errors import FailedPrecondition
from moesaic.expert_policy import ExpertPolicy
from router.gating.absence import Absence, stand_in_of
from router.gating.policy import LayerShape, check_restrictable, resolve, slots_of

# Policies whose views are kept for the next request; the others are resolved again.
MAX_VIEWS = 256
_NO_POLICY = ExpertPolicy()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GateView:
    """How the gate of a layer differs from that of the model folder. Compared by identity: it is prepared once, and rows that
    have the same one are assigned together."""

    # The slots that may be chosen, ascending.
    slots: tuple[int, ...]
    top_k: int
    # What scores those of the slots that the folder's gate does not score, or scores in another way, ascending.
    rows: Mapping[int, GateRow]


# The views that exist, by what they are. Epochs that differ in their experts alone have the same ones.
_VIEWS: WeakValueDictionary[tuple[object, ...], GateView] = WeakValueDictionary()


def _gate_view(slots: tuple[int, ...], top_k: int, rows: Mapping[int, GateRow]) -> GateView:
    return _VIEWS.setdefault((slots, top_k, *rows.items()), GateView(slots, top_k, rows))


@dataclass(frozen=True, slots=True, eq=False)
class ModelView:
    """What computes a sequence. Views with the same key compute the same."""

    epoch: Epoch
    # The id of the epoch and, where the policy changes anything, a hash of what it leaves.
    key: str
    # The version in every slot of a layer, those that the policy excludes among them.
    versions: Mapping[int, Mapping[int, bytes]]
    # Only the layers whose gate is not the folder's own.
    gates: Mapping[int, GateView]

    @classmethod
    def plain(cls, epoch: Epoch) -> ModelView:
        """An epoch that has the gates of the model folder."""
        return cls(epoch, epoch.id, _versions(epoch), {})


@dataclass(frozen=True, slots=True)
class ViewRows:
    """The rows [start, end) of a micro-batch, whose sequences have this view."""

    view: ModelView
    start: int
    end: int
    # What is done about slots that nobody computes; None where all are computed, or waited for.
    absence: Absence | None = None


class EpochViews:
    """The views of one epoch. Not thread-safe."""

    def __init__(self, epoch: Epoch, shapes: Mapping[int, LayerShape], hidden_size: int) -> None:
        """Raises FailedPrecondition, field `epoch`, for an epoch that is not one of this model, or that its gates cannot
        compute."""
        _check(epoch, shapes, hidden_size)
        self.epoch = epoch
        self._shapes = shapes
        self._versions = _versions(epoch)
        self.plain = self._make(_NO_POLICY)
        self._views: OrderedDict[ExpertPolicy, ModelView] = OrderedDict()
        self._by_key: dict[str, ModelView] = {self.plain.key: self.plain}

    def of(self, policy: ExpertPolicy | None) -> ModelView:
        """Raises the errors of `resolve`, and FailedPrecondition where the model cannot do without an expert."""
        if policy is not None and policy.on_missing is not None:
            if stand_in_of(policy.on_missing) is not None:
                check_restrictable(self._shapes, field="experts.on_missing", what=f"{policy.on_missing} is ")
            # What is done where an expert is missing changes nothing while none is.
            policy = replace(policy, on_missing=None)
        if policy is None or not policy:
            return self.plain
        view = self._views.get(policy)
        if view is None:
            made = self._make(policy)
            view = self._views[policy] = self._by_key.setdefault(made.key, made)
            self._bound()
        self._views.move_to_end(policy)
        return view

    def _bound(self) -> None:
        if len(self._views) > MAX_VIEWS:
            _, dropped = self._views.popitem(last=False)
            if dropped is not self.plain and dropped not in self._views.values():
                del self._by_key[dropped.key]

    def _make(self, policy: ExpertPolicy) -> ModelView:
        slots, top_ks = resolve(policy, self.epoch, self._shapes)
        rows = _rows(self.epoch)
        gates = {
            layer: _gate_view(
                left,
                top_ks[layer],
                {slot: row for slot, row in rows.get(layer, {}).items() if slot in left},
            )
            for layer, left in slots.items()
            if layer in rows or not _is_folders(left, top_ks[layer], self._shapes[layer])
        }
        return ModelView(self.epoch, self._key(slots, top_ks), self._versions, gates)

    def _key(self, slots: Mapping[int, tuple[int, ...]], top_ks: Mapping[int, int]) -> str:
        everything = slots_of(self.epoch), {layer: self._top_k(layer, left) for layer, left in slots.items()}
        if (slots, top_ks) == everything:
            return self.epoch.id
        content = repr((sorted(slots.items()), sorted(top_ks.items())))
        return f"{self.epoch.id}/{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def _top_k(self, layer: int, slots: Sequence[int]) -> int:
        return min(self._shapes[layer].top_k, len(slots))


def rows_among(views: Sequence[ViewRows], tokens: Sequence[int]) -> list[ViewRows]:
    """The same for those rows alone that are in `tokens`, which ascend; without the views that have none of them."""
    found = (
        replace(run, start=bisect_left(tokens, run.start), end=bisect_left(tokens, run.end)) for run in views
    )
    return [run for run in found if run.start < run.end]


def _is_folders(slots: Sequence[int], top_k: int, shape: LayerShape) -> bool:
    """Whether these are all slots of the model folder, and as many a token as there."""
    return len(slots) == shape.num_slots == slots[-1] + 1 and top_k == shape.top_k


def _versions(epoch: Epoch) -> dict[int, dict[int, bytes]]:
    versions: dict[int, dict[int, bytes]] = {}
    for (layer, slot), digest in epoch.versions.items():
        versions.setdefault(layer, {})[slot] = digest
    return versions


def _rows(epoch: Epoch) -> dict[int, dict[int, GateRow]]:
    rows: dict[int, dict[int, GateRow]] = {}
    for (layer, slot), row in epoch.gate_rows.items():
        rows.setdefault(layer, {})[slot] = row
    return rows


def _check(epoch: Epoch, shapes: Mapping[int, LayerShape], hidden_size: int) -> None:
    if {layer for layer, _ in epoch.versions} != shapes.keys():
        raise _unfit("its layers with experts are not those of this model")
    for layer, slots in slots_of(epoch).items():
        shape = shapes[layer]
        if slots[: shape.num_slots] != tuple(range(shape.num_slots)):
            raise _unfit(f"layer {layer} lacks an expert of the model folder")
        _check_rows(layer, slots[shape.num_slots :], shape, epoch)
    for (layer, slot), row in epoch.gate_rows.items():
        if len(row.values) != 4 * hidden_size:
            raise _unfit(f"the gate row of layer {layer} slot {slot} does not have {hidden_size} values")
        shape = shapes[layer]
        if (row.bias and not shape.biased) or (row.selection_bias and not shape.selection_biased):
            raise _unfit(f"the gate row of layer {layer} slot {slot} has a bias, which this model has not")


def _check_rows(layer: int, added: Sequence[int], shape: LayerShape, epoch: Epoch) -> None:
    scored = {slot for at, slot in epoch.gate_rows if at == layer}
    if shape.fixed is not None and (added or scored):
        raise _unfit(f"layer {layer} takes neither experts nor gate rows: {shape.fixed}")
    if missing := sorted(set(added) - scored):
        raise _unfit(f"layer {layer} slot {missing[0]} has no gate row")


def _unfit(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"epoch: {why}", field="epoch")
