"""Tensors on the wire: checked before they are touched, the same bits on both sides."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.wire_tensors import from_wire, to_wire

from moesaic.errors import InvalidArgument
from moesaic.v1 import common_pb2
from moesaic.wire.tensor_check import DTYPE_BYTES, SCALED_DTYPES, check_tensor, dtype_name, dtype_named
from moesaic.wire.tensors import TORCH_DTYPES

F32 = common_pb2.DTYPE_FLOAT32
UNSCALED_DTYPES = (F32, common_pb2.DTYPE_BFLOAT16, common_pb2.DTYPE_FLOAT16)


def refusal(message: common_pb2.Tensor, **wanted: object) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        check_tensor(message, **{"field": "hidden", "dtypes": (F32,), "shape": (None, 3)} | wanted)  # type: ignore[arg-type]
    return caught.value


@given(
    dtype=st.sampled_from([TORCH_DTYPES[dtype] for dtype in UNSCALED_DTYPES]),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_a_tensor_travels_bit_for_bit(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    message = common_pb2.Tensor.FromString(to_wire(sent).SerializeToString())
    check_tensor(message, field="x", dtypes=UNSCALED_DTYPES, shape=shape)
    received = from_wire(message)
    assert received.dtype == sent.dtype
    assert torch.equal(received, sent)


def test_a_view_with_strides_is_sent_in_row_order() -> None:
    table = torch.arange(12.0).view(3, 4)
    assert torch.equal(from_wire(to_wire(table.T)), table.T)


def test_a_received_tensor_outlives_its_message() -> None:
    message = to_wire(torch.arange(4.0))
    received = from_wire(message)
    del message
    assert received.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_bytes_are_little_endian() -> None:
    assert to_wire(torch.tensor([1.0])).data == b"\x00\x00\x80\x3f"


def test_every_wire_dtype_has_a_size_and_a_torch_dtype() -> None:
    assert DTYPE_BYTES.keys() == TORCH_DTYPES.keys()
    assert set(SCALED_DTYPES) == TORCH_DTYPES.keys() - set(UNSCALED_DTYPES)
    assert all(TORCH_DTYPES[dtype].itemsize == size for dtype, size in DTYPE_BYTES.items())
    assert dtype_name(common_pb2.DTYPE_BFLOAT16) == "bfloat16"
    assert all(dtype_named(dtype_name(dtype)) == dtype for dtype in TORCH_DTYPES)


def test_a_wrong_dtype_is_refused_by_field() -> None:
    error = refusal(to_wire(torch.zeros(2, 3, dtype=torch.float16)))
    assert error.field == "hidden.dtype"
    assert "float32" in error.message


@pytest.mark.parametrize("dtype", [common_pb2.DTYPE_UNSPECIFIED, 99])
def test_an_unknown_dtype_is_refused(dtype: int) -> None:
    assert refusal(common_pb2.Tensor(dtype=dtype, shape=[1, 3], data=bytes(12))).field == "hidden.dtype"  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 2, 3)])
def test_a_wrong_shape_is_refused_by_field(shape: tuple[int, ...]) -> None:
    error = refusal(to_wire(torch.zeros(shape)))
    assert error.field == "hidden.shape"
    assert "[any, 3]" in error.message


@pytest.mark.parametrize("num_bytes", [0, 23, 25])
def test_a_wrong_byte_count_is_refused_by_field(num_bytes: int) -> None:
    error = refusal(common_pb2.Tensor(dtype=F32, shape=[2, 3], data=bytes(num_bytes)))
    assert error.field == "hidden.data"
    assert "24 bytes" in error.message


def test_a_shape_far_larger_than_its_bytes_is_refused_without_allocating() -> None:
    message = common_pb2.Tensor(dtype=F32, shape=[2**32 - 1, 3], data=bytes(4))
    assert refusal(message).field == "hidden.data"


def test_the_bytes_may_be_counted_by_whoever_holds_them() -> None:
    header = common_pb2.Tensor(dtype=F32, shape=[2, 3])
    check_tensor(header, field="hidden", dtypes=(F32,), shape=(None, 3), num_bytes=24)
    assert refusal(header, num_bytes=23).field == "hidden.data"


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
@pytest.mark.parametrize(
    "scales", [(), (1.0,), (1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("inf")), (1.0, 1.0, 1.0)]
)
def test_scales_are_one_a_row_and_finite_and_above_zero(
    dtype: common_pb2.Dtype, scales: tuple[float, ...]
) -> None:
    raw = struct.pack(f"<{len(scales)}f", *scales)
    message = common_pb2.Tensor(dtype=dtype, shape=[2, 3], data=bytes(6), scales=raw)
    assert refusal(message, dtypes=SCALED_DTYPES).field == "hidden.scales"
    message.scales = struct.pack("<2f", 1.0, 2.0)
    check_tensor(message, field="hidden", dtypes=SCALED_DTYPES, shape=(None, 3))


def test_scales_beside_rows_that_need_none_are_refused() -> None:
    message = to_wire(torch.zeros(2, 3))
    message.scales = bytes(8)
    assert refusal(message).field == "hidden.scales"
