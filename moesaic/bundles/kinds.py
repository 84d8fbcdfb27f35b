"""Which kinds of expert this installation has, told without loading any of them."""

from __future__ import annotations

from importlib.metadata import entry_points

GROUP = "moesaic.expert_kinds"
OWN_KINDS = frozenset({"mlp", "lora", "int8"})


def installed_kinds() -> frozenset[str]:
    """The names of Moesaic's own kinds, and of those of other installed packages."""
    return OWN_KINDS | {entry.name for entry in entry_points(group=GROUP)}
