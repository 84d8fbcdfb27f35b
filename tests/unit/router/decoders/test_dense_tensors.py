"""Reading the router's tensors out of the forms that files hold them in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.safetensors_file import read_header
from moesaic.families.model import DenseTensor
from router.attention.rotary import pairs_side_by_side
from router.decoders.dense_tensors import pairs_half_apart, read_dense


def write(folder: Path, **files: dict[str, torch.Tensor]) -> Checkpoint:
    entries = {}
    for name, tensors in files.items():
        file = folder / f"{name}.safetensors"
        save_file(tensors, file)
        entries |= read_header(file)
    return Checkpoint(folder, {}, entries)


def read(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, **dense: DenseTensor
) -> dict[str, torch.Tensor]:
    return dict(read_dense(checkpoint, dense, dtype=dtype, device=torch.device("cpu")))


def test_several_parameters_may_lie_in_one_tensor_and_each_gets_its_rows(tmp_path: Path) -> None:
    joined = torch.randn(9, 4)
    checkpoint = write(tmp_path, model={"qkv": joined})
    parts = {name: DenseTensor((3, 4), "qkv", (3 * index, 3 * index + 3)) for index, name in enumerate("qkv")}
    tensors = read(checkpoint, **parts)
    assert torch.equal(torch.cat([tensors[name] for name in "qkv"]), joined)


def test_tensors_come_in_the_dtype_of_the_model_whatever_the_files_hold(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, one={"a": torch.ones(2).bfloat16()}, two={"b": torch.ones(2)})
    tensors = read(checkpoint, torch.bfloat16, a=DenseTensor((2,), "a"), b=DenseTensor((2,), "b"))
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys("ab", torch.bfloat16)


def test_tensors_that_are_exact_come_in_float32_unrounded(tmp_path: Path) -> None:
    values = torch.randn(2, 4)
    checkpoint = write(tmp_path, model={"gate": values, "up": values.clone()})
    dense = {name: DenseTensor((2, 4), name) for name in ("gate", "up")}
    device = torch.device("cpu")
    tensors = dict(read_dense(checkpoint, dense, dtype=torch.bfloat16, device=device, exact={"gate"}))
    assert torch.equal(tensors["gate"], values)
    assert torch.equal(tensors["up"], values.bfloat16())


@pytest.mark.parametrize("num_heads", [1, 2])
def test_rotary_rows_in_interleaved_order_are_put_into_half_order(tmp_path: Path, num_heads: int) -> None:
    rows = torch.arange(num_heads * 6 * 2, dtype=torch.float32).view(num_heads * 6, 2)
    checkpoint = write(tmp_path, model={"wq": rows})
    (read_rows,) = read(checkpoint, q=DenseTensor((num_heads * 6, 2), "wq", rotary_heads=num_heads)).values()
    order = [head * 6 + place for head in range(num_heads) for place in (0, 2, 4, 1, 3, 5)]
    assert torch.equal(read_rows, rows[order])


def test_either_order_of_rotary_rows_comes_from_the_other() -> None:
    rows = torch.randn(24, 5)
    assert torch.equal(pairs_side_by_side(pairs_half_apart(rows, 3), head_dim=8), rows)
    assert torch.equal(pairs_side_by_side(pairs_half_apart(rows[:, 0], 3), head_dim=8), rows[:, 0])


@pytest.mark.parametrize("rows", [None, (0, 130), (130, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_blocks_are_multiplied_by_their_own_factor(
    tmp_path: Path, rows: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    values = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scales = (torch.rand(3, 2) + 0.5).to(dtype)
    checkpoint = write(tmp_path, model={"w": values}, others={"w_scale_inv": scales})
    wide = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    expected = values.float() * wide
    first, end = rows or (0, 300)
    dense = DenseTensor((end - first, 200), "w", rows, scales="w_scale_inv")
    assert torch.equal(read(checkpoint, w=dense)["w"], expected[first:end])
