"""Gate rows in their effective form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import make_bundle

from moesaic.bundles import BundleGateRow, effective_row, effective_values
from moesaic.errors import InvalidArgument

ROW = np.array([3.0, -4.0, 0.0, 0.0], "f4")


def test_a_row_that_is_taken_as_it_is_keeps_its_bits(tmp_path: Path, base_folder: Path) -> None:
    bundle = make_bundle(tmp_path / "b", base_folder)
    row = bundle.manifest.experts[0].gate_row
    assert row is not None
    assert effective_row(bundle, row).values == bundle.read(row.tensor)


def test_biases_belong_to_the_row(tmp_path: Path, base_folder: Path) -> None:
    bundle = make_bundle(tmp_path / "b", base_folder)
    row = BundleGateRow("0.new.0.gate_row", bias=0.5, selection_bias=-1.0)
    effective = effective_row(bundle, row)
    assert (effective.bias, effective.selection_bias) == (0.5, -1.0)


@pytest.mark.parametrize("fields", [{"temperature": 1e-300}, {"bias": 1e300}, {"selection_bias": -1e39}])
def test_a_row_beyond_float32_is_refused(tmp_path: Path, base_folder: Path, fields: dict[str, Any]) -> None:
    bundle = make_bundle(tmp_path / "b", base_folder)
    with pytest.raises(InvalidArgument, match=r"0\.new\.0\.gate_row: ") as caught:
        effective_row(bundle, BundleGateRow("0.new.0.gate_row", **fields))
    assert (caught.value.field, caught.value.reason) == ("bundle", "BUNDLE_GATE_ROW")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_unit_rows_have_length_one_before_the_temperature(temperature: float) -> None:
    values = effective_values(ROW, "unit", temperature)
    assert np.allclose(values, ROW / 5 / temperature, rtol=1e-6)


def test_layernorm_rows_have_mean_zero_and_variance_one() -> None:
    values = effective_values(ROW, "layernorm", 1.0)
    assert (abs(values.mean()) < 1e-6, np.isclose(values.var(), 1.0)) == (True, True)


def test_a_row_of_zeros_stays_finite() -> None:
    for norm in ("unit", "layernorm"):
        assert not effective_values(np.zeros(4, "f4"), norm, 1.0).any()  # type: ignore[arg-type]
