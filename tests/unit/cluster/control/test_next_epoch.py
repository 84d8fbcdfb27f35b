"""The epoch that a change makes, and what is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import pytest
from support.played_base import HIDDEN, base_model

from cluster.control.next_epoch import Rows, add, remove, swap
from moesaic.bundles import BaseModel, BundleExpert, Manifest
from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, GateRow
from moesaic.errors import FailedPrecondition, InvalidArgument, MoesaicError, NotFound
from moesaic.families.model import Capacity, GateRule, Groups

BASE = base_model()
FIRST = Epoch.of(
    "tiny",
    {address: bytes([address.layer, address.slot]) * 16 for address in BASE.model.addresses},
    base=BASE.fingerprint,
)


def manifest(name: str, targets: Iterable[tuple[int, int | None]], seed: int = 1, **changes: Any) -> Manifest:
    experts = tuple(
        BundleExpert(layer, slot, "mlp", {}, bytes([seed, index]).ljust(32, b"\x07").hex(), {})
        for index, (layer, slot) in enumerate(targets)
    )
    values: dict[str, Any] = {
        "base_model": "tiny",
        "base_fingerprint": BASE.fingerprint.hex(),
        "hidden_size": HIDDEN,
        "experts": experts,
        "tensors": {},
        "tags": ("law",),
    }
    return Manifest(name=name, **values | changes)


def row(value: float = 1.0) -> GateRow:
    return GateRow(struct.pack(f"<{HIDDEN}f", *[value] * HIDDEN))


def swapped(epoch: Epoch, made: Manifest, rows: Rows | None = None, base: BaseModel = BASE) -> Epoch:
    return swap(epoch, made, made.name.encode().ljust(32, b"."), base, rows or {})


def added(epoch: Epoch, made: Manifest, rows: Rows | None = None, base: BaseModel = BASE) -> Epoch:
    given = dict.fromkeys(range(len(made.experts)), row()) if rows is None else rows
    return add(epoch, made, made.name.encode().ljust(32, b"."), base, given)


def test_a_swap_replaces_versions_and_names_its_bundle() -> None:
    made = manifest("legal", [(0, 2), (1, 0)])
    epoch = swapped(FIRST, made)
    assert epoch.versions[ExpertAddress(0, 2)] == bytes.fromhex(made.experts[0].version)
    assert epoch.versions[ExpertAddress(0, 1)] == FIRST.versions[ExpertAddress(0, 1)]
    digest = b"legal".ljust(32, b".")
    assert epoch.bundles == (
        EpochBundle("legal", digest, ("law",), (ExpertAddress(0, 2), ExpertAddress(1, 0))),
    )
    assert (epoch.base, epoch.gate_rows) == (BASE.fingerprint, {})


def test_a_slot_of_the_folder_has_the_row_of_its_bundle_and_of_no_bundle_before() -> None:
    address = ExpertAddress(0, 2)
    with_row = swapped(FIRST, manifest("legal", [(0, 2)]), {0: row()})
    assert with_row.gate_rows == {address: row()}
    assert swapped(with_row, manifest("law", [(0, 2)], 2)).gate_rows == {}


def test_a_bundle_that_takes_slots_over_leaves_the_other_one_what_is_left() -> None:
    one = swapped(FIRST, manifest("legal", [(0, 2), (1, 0)]))
    both = swapped(one, manifest("law", [(0, 2)], 2))
    assert {bundle.name: bundle.experts for bundle in both.bundles} == {
        "legal": (ExpertAddress(1, 0),),
        "law": (ExpertAddress(0, 2),),
    }
    assert [bundle.name for bundle in swapped(one, manifest("law", [(0, 2), (1, 0)], 2)).bundles] == ["law"]


def test_new_experts_get_the_lowest_slots_above_all_others() -> None:
    epoch = added(FIRST, manifest("maths", [(0, None), (0, None), (1, None)]))
    assert set(epoch.versions) - set(FIRST.versions) == {(0, 3), (0, 4), (1, 3)}
    assert set(epoch.gate_rows) == {(0, 3), (0, 4), (1, 3)}
    more = added(epoch, manifest("poems", [(0, None)], 2))
    assert set(more.versions) - set(epoch.versions) == {(0, 5)}


def test_what_was_added_is_swapped_with_its_row_and_removed_by_the_newer_name() -> None:
    one = added(FIRST, manifest("maths-v1", [(0, None)]))
    two = swapped(one, manifest("maths-v2", [(0, 3)], 2))
    assert two.gate_rows == one.gate_rows
    assert [bundle.name for bundle in two.bundles] == ["maths-v2"]
    assert remove(two, "maths-v2", BASE) == FIRST


def test_removing_what_was_added_gives_the_very_epoch_before() -> None:
    swapped_one = swapped(FIRST, manifest("legal", [(0, 2)]))
    assert remove(added(swapped_one, manifest("maths", [(1, None)], 2)), "maths", BASE) == swapped_one


ADDED = added(FIRST, manifest("maths", [(0, None)]))
SWAPPED = swapped(FIRST, manifest("legal", [(0, 2)]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda: swapped(FIRST, manifest("x", [(0, 7)])),
            FailedPrecondition,
            "layer 0 slot 7 does not exist",
        ),
        (lambda: swapped(FIRST, manifest("x", [(0, None)])), InvalidArgument, "it is added, not swapped"),
        (lambda: added(FIRST, manifest("x", [(0, 1)])), InvalidArgument, "it is swapped, not added"),
        (lambda: swapped(SWAPPED, manifest("legal", [(0, 2)])), FailedPrecondition, "has all of it already"),
        (lambda: swapped(SWAPPED, manifest("legal", [(1, 2)], 2)), FailedPrecondition, "legal is in use"),
        (lambda: added(ADDED, manifest("maths", [(0, None)], 2)), FailedPrecondition, "maths is in use"),
        (lambda: added(FIRST, manifest("x", [(0, None)]), {}), InvalidArgument, "has no gate row"),
        (lambda: added(FIRST, manifest("x", [(9, None)])), FailedPrecondition, "layer 9 of the model has no"),
        (
            lambda: added(FIRST, manifest("x", [(0, None)]), {0: GateRow(b"1234")}),
            InvalidArgument,
            "8 float32",
        ),
        (
            lambda: added(FIRST, manifest("x", [(0, None)]), {0: row(float("nan"))}),
            InvalidArgument,
            "has NaN or infinity",
        ),
        (
            lambda: swapped(FIRST, manifest("x", [(0, 1)], base_fingerprint="0" * 64)),
            InvalidArgument,
            "made for another model",
        ),
        (lambda: remove(FIRST, "maths", BASE), NotFound, "has no bundle 'maths'"),
        (lambda: remove(SWAPPED, "legal", BASE), FailedPrecondition, "roll back instead"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: Any, error: type[MoesaicError], message: str) -> None:
    with pytest.raises(error, match=message):
        change()


@pytest.mark.parametrize(
    ("rule", "capacity", "why"),
    [
        (GateRule(2, own=True), None, "own gate"),
        (GateRule(2, groups=Groups(3, 1, 1)), None, "groups"),
        (GateRule(2), Capacity("fraction"), "limited capacity"),
    ],
)
def test_families_that_cannot_grow_say_why_and_can_be_swapped(
    rule: GateRule, capacity: Capacity | None, why: str
) -> None:
    base = base_model(gate=rule, capacity=capacity)
    with pytest.raises(FailedPrecondition, match=why):
        added(FIRST, manifest("x", [(0, None)]), base=base)
    assert swapped(FIRST, manifest("x", [(0, 1)]), base=base).id != FIRST.id
