"""Tensors to the wire and back; what `auto` means for device and dtype."""

from __future__ import annotations

import pytest
import torch
from support.wire_tensors import from_wire, to_wire

from moesaic.compute.device import choose_device, choose_dtype
from moesaic.errors import InvalidArgument
from moesaic.v1 import common_pb2
from moesaic.wire.tensor_check import SCALED_DTYPES, check_tensor
from moesaic.wire.tensors import data_of, decode_rows, encode_rows, view_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (7,)])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    assert torch.equal(from_wire(to_wire(tensor)), tensor)


def test_a_strided_tensor_is_written_in_its_own_order() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(from_wire(to_wire(tensor)), tensor)


def travel(rows: torch.Tensor, dtype: common_pb2.Dtype) -> torch.Tensor:
    """What the other side makes of rows, once it has checked them."""
    header, wire = encode_rows(rows, dtype)
    data = memoryview(bytes(data_of(wire)))
    check_tensor(header, field="x", dtypes=(dtype,), shape=rows.shape, num_bytes=data.nbytes)
    return decode_rows(header, view_rows(header, data))


def test_rows_that_are_in_the_dtype_of_the_wire_are_not_copied() -> None:
    rows = torch.randn(3, 5)
    assert encode_rows(rows, common_pb2.DTYPE_FLOAT32)[1].data_ptr() == rows.data_ptr()
    assert torch.equal(travel(rows, common_pb2.DTYPE_BFLOAT16), rows.bfloat16())


@pytest.mark.parametrize(("dtype", "error"), [(common_pb2.DTYPE_INT8, 0.5 / 127)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-25, 3e38])
def test_scaled_rows_come_back_within_the_step_of_their_dtype(
    dtype: common_pb2.Dtype, error: float, magnitude: float
) -> None:
    rows = torch.rand(6, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows[:, 0] = 1.0  # the extreme of every row
    rows *= magnitude
    back = travel(rows, dtype)
    assert back.dtype == torch.float32 and back.isfinite().all()
    assert ((back - rows).abs() / magnitude).max() <= error * 1.001


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
def test_rows_of_zeros_and_of_next_to_nothing_come_back_as_zeros(dtype: common_pb2.Dtype) -> None:
    rows = torch.zeros(2, 4)
    rows[1] = 1e-40
    assert travel(rows, dtype).abs().max() == 0


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_seen_by_the_other_side(dtype: common_pb2.Dtype, bad: float) -> None:
    rows = torch.ones(2, 4)
    rows[1, 2] = bad
    with pytest.raises(InvalidArgument) as refused:
        travel(rows, dtype)
    assert refused.value.field == "x.scales"


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
def test_half_precision_rows_at_their_limit_stay_finite(dtype: common_pb2.Dtype) -> None:
    for limit in (torch.float16, torch.bfloat16):
        rows = torch.full((1, 4), torch.finfo(limit).max, dtype=limit)
        assert travel(rows, dtype).to(limit).isfinite().all()


def test_device_and_dtype_follow_the_machine_and_the_checkpoint() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_device("cpu") == cpu
    assert choose_dtype("auto", cpu, "bfloat16") == torch.float32
    assert choose_dtype("auto", cuda, "bfloat16") == torch.bfloat16
    assert choose_dtype("auto", cuda, "float16") == torch.float32
    assert choose_dtype("bfloat16", cpu, "float32") == torch.bfloat16
    assert choose_dtype("float32", cuda, "bfloat16") == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InvalidArgument) as caught:
        choose_device("cuda")
    assert caught.value.field == "device"
