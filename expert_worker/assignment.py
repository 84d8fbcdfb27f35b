"""The textual form of "which experts": what `--experts` takes.

A comma-separated list of [LAYERS:]SLOTS, each a number or a range FIRST-LAST with both ends in; without LAYERS, every
layer. `0-3`: slots 0 to 3 of every layer. `0:0-7,1:2`: all of 0 to 7 in layer 0, and slot 2 in layer 1. `all`: everything.
"""

from __future__ import annotations

import re

from moesaic.errors import InvalidArgument
from moesaic.manifest import ExpertAddress

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def parse_experts(text: str, *, num_layers: int, num_slots: int) -> frozenset[ExpertAddress]:
    """The addresses that the text names. Raises InvalidArgument for anything that the model does not have."""
    if text.strip() == "all":
        text = f"0-{num_slots - 1}"
    return frozenset(
        address
        for item in text.split(",")
        for address in _parse_item(item.strip(), num_layers=num_layers, num_slots=num_slots)
    )


def _parse_item(item: str, *, num_layers: int, num_slots: int) -> list[ExpertAddress]:
    layers, separator, slots = item.rpartition(":")
    layer_range = _parse_range(layers, num_layers, "layer") if separator else range(num_layers)
    slot_range = _parse_range(slots, num_slots, "slot")
    return [ExpertAddress(layer, slot) for layer in layer_range for slot in slot_range]


def _parse_range(text: str, count: int, noun: str) -> range:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(
            "experts: must be a list of [LAYERS:]SLOTS such as 0-3 or 0:0-7,1:2", field="experts"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise InvalidArgument(f"experts: a {noun} range ends before it begins", field="experts")
    if last >= count:
        raise InvalidArgument(
            f"experts: the model has {count} {noun}s, the last is {count - 1}", field="experts"
        )
    return range(first, last + 1)
