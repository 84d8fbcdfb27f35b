"""The effective form of a gate row: what a router multiplies hidden states with.

Shapes: D hidden size.
"""

from __future__ import annotations

import numpy as np

from moesaic.bundles.bundle import Bundle, Floats
from moesaic.bundles.manifest import BundleGateRow, NormMode
from moesaic.epoch import GateRow

_LEAST_NORM = 1e-8


def effective_values(values: Floats, norm: NormMode, temperature: float) -> Floats:
    """[D] as they are, with length one, or with mean zero and variance one; then divided by the temperature."""
    wide = np.asarray(values, np.float64)
    if norm == "unit":
        wide = wide / max(float(np.linalg.norm(wide)), _LEAST_NORM)
    elif norm == "layernorm":
        wide = wide - wide.mean()
        wide = wide / max(float(np.sqrt((wide**2).mean())), _LEAST_NORM)
    effective: Floats = (wide / temperature).astype("<f4")
    return effective


def effective_row(bundle: Bundle, row: BundleGateRow) -> GateRow:
    """What an epoch holds of a bundle's row. A row that is taken as it is keeps its bits."""
    values = effective_values(bundle.floats(row.tensor), row.norm, row.temperature)
    return GateRow(values.tobytes(), row.bias, row.selection_bias)
