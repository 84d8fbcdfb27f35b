"""The kinds of expert by name: Moesaic's own, and those of other installed packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import cast

from expert_worker.experts.kinds.int8 import Int8Kind
from expert_worker.experts.kinds.kind import ExpertKind
from expert_worker.experts.kinds.lora import LoraKind
from expert_worker.experts.kinds.mlp import MlpKind
from moesaic.bundles.kinds import GROUP, installed_kinds
from moesaic.bundles.refusal import refuse

_OWN: dict[str, type[ExpertKind]] = {kind.name: kind for kind in (MlpKind, LoraKind, Int8Kind)}


def find_kind(name: str) -> type[ExpertKind]:
    """The kind of this name. Raises InvalidArgument, which lists those that are installed."""
    if (own := _OWN.get(name)) is not None:
        return own
    entry = next(iter(entry_points(group=GROUP, name=name)), None)
    if entry is None:
        refuse(
            "KIND", name, f"no such kind of expert is installed, but {', '.join(sorted(installed_kinds()))}"
        )
    return cast(type[ExpertKind], entry.load())
