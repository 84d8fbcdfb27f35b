"""The gate rows of a bundle in their effective form."""

from __future__ import annotations

from moesaic.bundles import Bundle, effective_row
from moesaic.epoch import GateRow


def effective_rows(bundle: Bundle) -> dict[int, GateRow]:
    """By the index of the expert in the manifest, those that the bundle brings. Raises InvalidArgument."""
    return {
        index: effective_row(bundle, expert.gate_row)
        for index, expert in enumerate(bundle.manifest.experts)
        if expert.gate_row is not None
    }
