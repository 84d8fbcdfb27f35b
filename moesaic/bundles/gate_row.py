"""The effective form of a gate row: what a router multiplies hidden states with.

Shapes: D hidden size.
"""

from __future__ import annotations

import numpy as np

from moesaic.bundles.bundle import Bundle, Floats
from moesaic.bundles.manifest import BundleGateRow, NormMode
from moesaic.bundles.refusal import refuse
from moesaic.epoch import GateRow

_LEAST_NORM = 1e-8
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def effective_values(values: Floats, norm: NormMode, temperature: float) -> Floats:
    """[D] as they are, with length one, or with mean zero and variance one; then divided by the temperature.

    What is then beyond float32 is infinite.
    """
    wide = np.asarray(values, np.float64)
    if norm == "unit":
        wide = wide / max(float(np.linalg.norm(wide)), _LEAST_NORM)
    elif norm == "layernorm":
        wide = wide - wide.mean()
        wide = wide / max(float(np.sqrt((wide**2).mean())), _LEAST_NORM)
    with np.errstate(over="ignore"):
        effective: Floats = (wide / temperature).astype("<f4")
    return effective


def effective_row(bundle: Bundle, row: BundleGateRow) -> GateRow:
    """What an epoch holds of a bundle's row. A row that is taken as it is keeps its bits.

    Raises InvalidArgument with field `bundle` for numbers that float32, in which a row travels, does not hold.
    """
    values = effective_values(bundle.floats(row.tensor), row.norm, row.temperature)
    if not np.isfinite(values).all():
        refuse("GATE_ROW", row.tensor[:64], "is not finite where it is divided by its temperature")
    if max(abs(row.bias), abs(row.selection_bias)) > _MAX_FLOAT32:
        refuse("GATE_ROW", row.tensor[:64], "its biases must be numbers that float32 holds")
    return GateRow(values.tobytes(), row.bias, row.selection_bias)
