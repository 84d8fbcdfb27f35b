"""The epoch that a change makes out of another one. Pure.

Slots of the model folder are never added or removed; their versions can be replaced. A new expert gets the lowest slot
above all of the model folder's and all of the epoch's, so that a number means one expert within an epoch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace

from moesaic.bundles import BaseModel, Manifest, growth_problem
from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, GateRow
from moesaic.errors import FailedPrecondition, InvalidArgument, NotFound

# The effective gate rows of a bundle, by the index of the expert in the manifest.
Rows = Mapping[int, GateRow]


def swap(epoch: Epoch, manifest: Manifest, digest: bytes, base: BaseModel, rows: Rows) -> Epoch:
    """Other versions in slots that the epoch has.

    A slot of the model folder is scored by the folder's row again unless the bundle brings one; any other slot keeps
    its row. Raises FailedPrecondition, or InvalidArgument with field `bundle`.
    """
    _check_base(manifest, base)
    versions, gate_rows = dict(epoch.versions), dict(epoch.gate_rows)
    targets = []
    for index, expert in enumerate(manifest.experts):
        if expert.slot is None:
            raise InvalidArgument(
                "bundle: brings new slots: it is added, not swapped", field="bundle", reason="ADDS_SLOTS"
            )
        address = ExpertAddress(expert.layer, expert.slot)
        if address not in versions:
            raise FailedPrecondition(
                f"bundle: layer {address.layer} slot {address.slot} does not exist in epoch {epoch.id}",
                field="bundle",
                reason="NO_SUCH_SLOT",
            )
        versions[address] = bytes.fromhex(expert.version)
        if index in rows:
            gate_rows[address] = _checked(rows[index], address, manifest.hidden_size)
        elif is_base(address, base):
            gate_rows.pop(address, None)
        targets.append(address)
    others = _without(epoch.bundles, targets)
    _check_name(manifest.name, others)
    bundle = EpochBundle(manifest.name, digest, manifest.tags, tuple(sorted(targets)))
    return _changed(epoch, versions, gate_rows, (*others, bundle))


def add(epoch: Epoch, manifest: Manifest, digest: bytes, base: BaseModel, rows: Rows) -> Epoch:
    """New slots with their gate rows. Raises FailedPrecondition, or InvalidArgument with field `bundle`."""
    _check_base(manifest, base)
    _check_name(manifest.name, epoch.bundles)
    versions, gate_rows = dict(epoch.versions), dict(epoch.gate_rows)
    targets = []
    for index, expert in enumerate(manifest.experts):
        if expert.slot is not None:
            raise InvalidArgument(
                "bundle: replaces slots: it is swapped, not added", field="bundle", reason="REPLACES_SLOTS"
            )
        _check_growth(expert.layer, base)
        address = ExpertAddress(expert.layer, _free_slot(versions, expert.layer, base))
        if index not in rows:
            raise InvalidArgument(
                f"bundle: layer {expert.layer}: has no gate row, so that no token would choose the expert",
                field="bundle",
                reason="NO_GATE_ROW",
            )
        versions[address] = bytes.fromhex(expert.version)
        gate_rows[address] = _checked(rows[index], address, manifest.hidden_size)
        targets.append(address)
    bundle = EpochBundle(manifest.name, digest, manifest.tags, tuple(targets))
    return _changed(epoch, versions, gate_rows, (*epoch.bundles, bundle))


def remove(epoch: Epoch, name: str, base: BaseModel) -> Epoch:
    """Without the slots that a bundle added. Raises NotFound or FailedPrecondition."""
    bundle = next((bundle for bundle in epoch.bundles if bundle.name == name), None)
    if bundle is None:
        raise NotFound(f"name: epoch {epoch.id} has no bundle {name!r}", field="name")
    if any(is_base(address, base) for address in bundle.experts):
        raise FailedPrecondition(
            f"name: {name} replaced experts of the model, which cannot be taken away: roll back instead",
            field="name",
            reason="NOT_ADDED",
        )
    gone = set(bundle.experts)
    versions = {address: digest for address, digest in epoch.versions.items() if address not in gone}
    gate_rows = {address: row for address, row in epoch.gate_rows.items() if address not in gone}
    return _changed(epoch, versions, gate_rows, [other for other in epoch.bundles if other != bundle])


def is_base(address: ExpertAddress, base: BaseModel) -> bool:
    """Whether the slot is one of the model folder's."""
    layer = base.model.experts.get(address.layer)
    return layer is not None and address.slot < layer.num_slots


def _changed(
    epoch: Epoch,
    versions: Mapping[ExpertAddress, bytes],
    gate_rows: Mapping[ExpertAddress, GateRow],
    bundles: Iterable[EpochBundle],
) -> Epoch:
    changed = Epoch.of(epoch.model, versions, gate_rows=gate_rows, bundles=bundles, base=epoch.base)
    if changed.id == epoch.id:
        raise FailedPrecondition(f"epoch {epoch.id} has all of it already", reason="NOTHING_CHANGES")
    return changed


def _without(bundles: Iterable[EpochBundle], targets: Iterable[ExpertAddress]) -> tuple[EpochBundle, ...]:
    """The bundles without the slots that another one takes over, and without those that have none left."""
    taken = set(targets)
    left = (
        replace(bundle, experts=tuple(address for address in bundle.experts if address not in taken))
        for bundle in bundles
    )
    return tuple(bundle for bundle in left if bundle.experts)


def _free_slot(versions: Mapping[ExpertAddress, bytes], layer: int, base: BaseModel) -> int:
    slots = (address.slot + 1 for address in versions if address.layer == layer)
    return max(base.model.experts[layer].num_slots, *slots)


def _check_base(manifest: Manifest, base: BaseModel) -> None:
    if manifest.base_fingerprint != base.fingerprint.hex():
        raise InvalidArgument(
            f"bundle: is made for another model ({manifest.base_model[:64]})",
            field="bundle",
            reason="BUNDLE_BASE",
        )


def _check_name(name: str, bundles: Iterable[EpochBundle]) -> None:
    if any(bundle.name == name for bundle in bundles):
        raise FailedPrecondition(
            f"bundle: the name {name} is in use in the epoch: give the bundle another one, or remove that first",
            field="bundle",
            reason="NAME_IN_USE",
        )


def _check_growth(layer: int, base: BaseModel) -> None:
    described = base.model.experts.get(layer)
    problem = "has no experts" if described is None else growth_problem(described)
    if problem is not None:
        raise FailedPrecondition(
            f"bundle: layer {layer} of the model {problem}", field="bundle", reason="CANNOT_GROW"
        )


def _checked(row: GateRow, address: ExpertAddress, hidden_size: int) -> GateRow:
    if len(row.values) != 4 * hidden_size:
        raise InvalidArgument(
            f"gate_rows: layer {address.layer}: must be {hidden_size} float32", field="gate_rows"
        )
    numbers = (*struct.unpack(f"<{hidden_size}f", row.values), row.bias, row.selection_bias)
    if not all(map(math.isfinite, numbers)):
        raise InvalidArgument(
            f"gate_rows: layer {address.layer}: has NaN or infinity", field="gate_rows", reason="NOT_FINITE"
        )
    return row
