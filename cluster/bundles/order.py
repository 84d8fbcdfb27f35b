"""What is to be packed, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.bundles.comparison import Moved, percent
from cluster.bundles.model_folder import ModelFolder
from cluster.bundles.selection import Origin, Wanted
from moesaic.bundles import Bundle, BundleExpert, Manifest

_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be packed, and what people are to read in the manifest."""

    tuned: Path
    base: Path
    out: Path
    wanted: Wanted = field(default_factory=Wanted)
    # Pack the experts although the fine-tune moved other tensors, too.
    experts_only: bool = False
    name: str | None = None
    description: str = ""
    licence: str = ""
    owner: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackedExpert:
    """An expert of the new bundle. A difference is relative to the base's expert or row; None: there is none."""

    layer: int
    slot: int
    target: int | None
    difference: float | None
    row_difference: float | None
    has_row: bool


@dataclass(frozen=True, slots=True)
class Packed:
    """A bundle that was written, and what it leaves out."""

    bundle: Bundle
    origin: Origin
    compared: int
    experts: tuple[PackedExpert, ...]
    moved: tuple[Moved, ...]


# What happens, how much of it is done, and how much there is.
Show = Callable[[str, int, int], None]


def bundle_name(order: Order) -> str:
    """The name that was asked for, or the one of the folder."""
    return order.name or _NOT_IN_NAMES.sub("-", order.out.resolve().name.lower()).strip("-")[:64]


def draft_manifest(
    order: Order,
    base: ModelFolder,
    origin: Origin,
    experts: Sequence[BundleExpert],
    packed: Iterable[PackedExpert],
    left_out: str,
) -> Manifest:
    """The manifest without its tensors and versions, which follow from what is written."""
    return Manifest(
        name=bundle_name(order),
        base_model=base.name,
        base_fingerprint=base.as_base().fingerprint.hex(),
        hidden_size=base.model.hidden_size,
        experts=tuple(experts),
        tensors={},
        description=order.description,
        licence=order.licence,
        owner=order.owner,
        tags=order.tags,
        origin=_origin(order.tuned.resolve().name, origin, packed, left_out),
    )


def _origin(tuned: str, origin: Origin, experts: Iterable[PackedExpert], left_out: str) -> dict[str, str]:
    said = {"packed_from": tuned, "which_is": str(origin)}
    for expert in experts:
        said.setdefault(f"layer {expert.layer}", "")
        said[f"layer {expert.layer}"] += f"{'; ' if said[f'layer {expert.layer}'] else ''}{_words(expert)}"
    return {**said, "left_out": left_out} if left_out else said


def _words(expert: PackedExpert) -> str:
    words = f"slot {expert.slot}"
    if expert.difference is not None:
        words += f" differs by {percent(expert.difference)}"
    if expert.row_difference:
        words += f", its gate row by {percent(expert.row_difference)}"
    return words
