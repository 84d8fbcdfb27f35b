"""Which experts of a fine-tuned model go into a bundle, and where they are to go. Pure.

Slots are counted per layer; a target None is a new slot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from moesaic.errors import InvalidArgument

_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


class Origin(StrEnum):
    """What the folder is that experts are taken from."""

    SAME_SIZE = "a fine-tune of the base"
    MORE_SLOTS = "the base with further slots"
    # FlexOlmo: the first half are experts of the base, which were frozen while the others were trained.
    PUBLIC_AND_OWN = "experts of the base, frozen, and as many of its own"
    ADAPTER = "a low-rank adapter of the base"
    DENSE = "a dense model, whose MLPs become experts"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An expert that may be packed. `target` is the slot that it replaces; None: it becomes a new one."""

    layer: int
    slot: int
    target: int | None


# Where experts go: into new slots, or into the slots of their own numbers, which an earlier bundle may have added.
Into = Literal["new", "same"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for. None: whatever differs, and slots of the base into their own, others into new ones."""

    layers: frozenset[int] | None = None
    slots: frozenset[int] | None = None
    into: Into | None = None


def parse_numbers(text: str | None, field: str) -> frozenset[int] | None:
    """`3,10-20` as numbers. Raises InvalidArgument with this field."""
    if text is None:
        return None
    numbers: set[int] = set()
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise InvalidArgument(f"{field}: must be numbers and ranges, such as 3 or 0,10-20", field=field)
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(numbers)


def parse_into(text: str | None) -> Into | None:
    """Raises InvalidArgument with field `into`."""
    match text:
        case "new" | "same":
            return text
        case None:
            return None
        case _:
            raise InvalidArgument("into: must be new or same", field="into")


def find_origin(tuned: Mapping[int, int], base: Mapping[int, int], *, dense: bool) -> Origin:
    """`tuned`, `base`: the number of slots of each layer with experts. Raises InvalidArgument with field `model`."""
    if dense:
        return Origin.DENSE
    common = tuned.keys() & base.keys()
    if tuned.keys() != base.keys() or not common:
        _refuse("has experts in other layers than the base")
    if all(tuned[layer] == base[layer] for layer in common):
        return Origin.SAME_SIZE
    if all(tuned[layer] > base[layer] for layer in common):
        return Origin.MORE_SLOTS
    if all(tuned[layer] % 2 == 0 and tuned[layer] // 2 <= base[layer] for layer in common):
        return Origin.PUBLIC_AND_OWN
    _refuse(
        "has another number of experts than the base, and is no pair of an expert of the base and a new one"
    )
    raise AssertionError


def choose(
    origin: Origin, tuned: Mapping[int, int], base: Mapping[int, int], wanted: Wanted
) -> tuple[Candidate, ...]:
    """Raises InvalidArgument with field `layers` or `slots`."""
    layers = sorted(tuned.keys() & base.keys() if wanted.layers is None else wanted.layers)
    if missing := [layer for layer in layers if layer not in tuned or layer not in base]:
        raise InvalidArgument(f"layers: layer {missing[0]} has no experts", field="layers")
    found = tuple(
        _place(origin, layer, slot, base[layer], into=wanted.into)
        for layer in layers
        for slot in _slots(origin, tuned[layer], base[layer], wanted)
    )
    if len({candidate.target is None for candidate in found}) > 1:
        raise InvalidArgument(
            "slots: some are new and some replace slots of the base: pack a bundle of each", field="slots"
        )
    return found


def _slots(origin: Origin, tuned: int, base: int, wanted: Wanted) -> list[int]:
    if wanted.slots is None:
        first = {Origin.MORE_SLOTS: base, Origin.PUBLIC_AND_OWN: tuned // 2}.get(origin, 0)
        return list(range(first, tuned))
    if beyond := sorted(slot for slot in wanted.slots if slot >= tuned):
        raise InvalidArgument(f"slots: there is no slot {beyond[0]}, the last is {tuned - 1}", field="slots")
    if origin is Origin.PUBLIC_AND_OWN and min(wanted.slots) < tuned // 2:
        raise InvalidArgument(f"slots: slots below {tuned // 2} are the base's own experts", field="slots")
    return sorted(wanted.slots)


def _place(origin: Origin, layer: int, slot: int, base: int, *, into: Into | None) -> Candidate:
    numbered_alike = origin in (Origin.SAME_SIZE, Origin.MORE_SLOTS)
    if into == "same" and not numbered_alike:
        raise InvalidArgument("into: the slots of this model are not numbered as the base's", field="into")
    replaces = into == "same" or (into is None and numbered_alike and slot < base)
    return Candidate(layer, slot, slot if replaces else None)


def _refuse(problem: str) -> None:
    raise InvalidArgument(f"model: {problem}", field="model")
