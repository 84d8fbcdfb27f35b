"""Tensors that are compared where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic.checkpoints.safetensors_file import TensorEntry, read_header
from moesaic.checkpoints.stored_values import have_same_values
from moesaic.errors import CheckpointError

# More than one block of what is read at once.
ROWS = torch.arange(3 << 18, dtype=torch.float32).view(1024, -1)


def entries(folder: Path, **tensors: torch.Tensor) -> Mapping[str, TensorEntry]:
    save_file(tensors, folder / "some.safetensors")
    return read_header(folder / "some.safetensors")


def test_equal_tensors_have_the_same_values_and_others_do_not(tmp_path: Path) -> None:
    last = ROWS.clone()
    last[-1, -1] += 1
    held = entries(
        tmp_path, one=ROWS, copy=ROWS.clone(), last=last, other=ROWS.flatten().clone(), narrow=ROWS.bfloat16()
    )
    assert have_same_values(held["one"], held["copy"])
    assert not any(have_same_values(held["one"], held[name]) for name in ("last", "other", "narrow"))


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    held = entries(tmp_path, one=ROWS, copy=ROWS.clone())
    with (tmp_path / "some.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="is cut off") as error:
        have_same_values(held["copy"], held["one"])
    assert error.value.field == "some.safetensors"


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    held = entries(tmp_path, one=ROWS, copy=ROWS.clone())
    (tmp_path / "some.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"some\.safetensors: cannot be read"):
        have_same_values(held["one"], held["copy"])
