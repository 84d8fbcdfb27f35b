"""The text form of a set of experts, as the option `--experts` takes it.

A comma-separated list of items [LAYERS:]SLOTS. LAYERS and SLOTS are each a number or a range FIRST-LAST that
includes both ends; without LAYERS an item is of every layer that has experts. `0-3`: slots 0 to 3 of every
layer. `0:0-7,1:2`: slots 0 to 7 of layer 0, and slot 2 of layer 1. `all`: every expert.

Layers may differ in their number of slots. An item names those of its slots that exist in each of its layers;
its last slot must exist in one of them, and every layer of LAYERS must have experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument

_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def parse_experts(text: str, num_slots: Mapping[int, int]) -> frozenset[ExpertAddress]:
    """The addresses that the text names. `num_slots` has the number of slots of every layer with experts.

    Raises InvalidArgument for an expert that the model does not have.
    """
    if not num_slots:
        raise InvalidArgument("experts: the model has none for a worker to hold", field="experts")
    if text.strip() == "all":
        text = f"0-{max(num_slots.values()) - 1}"
    return frozenset(address for item in text.split(",") for address in _parse_item(item.strip(), num_slots))


def _parse_item(item: str, num_slots: Mapping[int, int]) -> list[ExpertAddress]:
    named, separator, slots = item.rpartition(":")
    layers = _parse_layers(named, num_slots) if separator else tuple(num_slots)
    slot_range = _parse_range(slots, "slot")
    most = max(num_slots[layer] for layer in layers)
    if slot_range[-1] >= most:
        where = f"layer {named.strip()} of the model" if separator else "the model"
        raise InvalidArgument(f"experts: {where} has {most} slots, the last is {most - 1}", field="experts")
    return [ExpertAddress(layer, slot) for layer in layers for slot in slot_range if slot < num_slots[layer]]


def _parse_layers(text: str, num_slots: Mapping[int, int]) -> Sequence[int]:
    layers = _parse_range(text, "layer")
    missing = next((layer for layer in layers if layer not in num_slots), None)
    if missing is not None:
        have = f"{len(num_slots)} layers from {min(num_slots)} to {max(num_slots)} have"
        raise InvalidArgument(f"experts: layer {missing} has none, {have}", field="experts")
    return layers


def _parse_range(text: str, noun: str) -> range:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(
            "experts: must be a list of [LAYERS:]SLOTS such as 0-3 or 0:0-7,1:2", field="experts"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise InvalidArgument(f"experts: a {noun} range ends before it begins", field="experts")
    return range(first, last + 1)
