"""The gate rows of a bundle in their effective form: normalised as the bundle says, and divided by the temperature."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.bundles import Bundle, BundleGateRow
from moesaic.epoch import GateRow


def effective_rows(bundle: Bundle) -> dict[int, GateRow]:
    """By the index of the expert in the manifest, those that the bundle brings. Raises InvalidArgument."""
    return {
        index: _effective(expert.gate_row, bundle.floats(expert.gate_row.tensor))
        for index, expert in enumerate(bundle.manifest.experts)
        if expert.gate_row is not None
    }


def _effective(row: BundleGateRow, values: NDArray[np.float32]) -> GateRow:
    """Computed in float64, so that the norm costs no precision."""
    exact = values.astype(np.float64)
    match row.norm:
        case "unit":
            exact /= np.linalg.norm(exact)
        case "layernorm":
            exact = (exact - exact.mean()) / exact.std()
        case "none":
            pass
    return GateRow(
        (exact / row.temperature).astype("<f4").tobytes(), bias=row.bias, selection_bias=row.selection_bias
    )
