"""Checks of tensors on the wire, which are raw little-endian bytes with dtype and shape. Imports no torch.

A tensor that arrives is checked before its bytes are touched: dtype, shape and byte count have to be those
that the receiver expects, so that a wrong message is an error with a field name and never a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from moesaic.errors import InvalidArgument
from moesaic.v1 import common_pb2

# Bytes per element.
DTYPE_BYTES: dict[common_pb2.Dtype, int] = {
    common_pb2.DTYPE_FLOAT32: 4,
    common_pb2.DTYPE_BFLOAT16: 2,
    common_pb2.DTYPE_FLOAT16: 2,
    common_pb2.DTYPE_INT8: 1,
}
# The dtypes whose rows have one float32 scale each.
SCALED_DTYPES = (common_pb2.DTYPE_INT8,)
SCALE_BYTES = 4


def dtype_name(dtype: common_pb2.Dtype) -> str:
    """`DTYPE_BFLOAT16` -> `bfloat16`."""
    return common_pb2.Dtype.Name(dtype).removeprefix("DTYPE_").lower()


def dtype_named(name: str) -> common_pb2.Dtype:
    """`bfloat16` -> `DTYPE_BFLOAT16`."""
    return next(dtype for dtype in DTYPE_BYTES if dtype_name(dtype) == name)


def check_tensor(
    tensor: common_pb2.Tensor,
    *,
    field: str,
    dtypes: Collection[common_pb2.Dtype],
    shape: Sequence[int | None],
    num_bytes: int | None = None,
) -> None:
    """Raises InvalidArgument unless the tensor has one of `dtypes`, has `shape` (None: any extent), holds
    exactly the bytes of both (`num_bytes`, where its data are not in the message) and one scale per row if
    its dtype has scales."""
    dtype, extents = tensor.dtype, tensor.shape[:]
    if dtype not in dtypes:
        expected = ", ".join(dtype_name(dtype) for dtype in dtypes)
        raise InvalidArgument(f"{field}.dtype must be one of: {expected}", field=f"{field}.dtype")
    if len(extents) != len(shape) or any(
        want is not None and got != want for got, want in zip(extents, shape, strict=True)
    ):
        expected = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InvalidArgument(f"{field}.shape must be [{expected}]", field=f"{field}.shape")
    wanted_bytes = math.prod(extents) * DTYPE_BYTES[dtype]
    if (len(tensor.data) if num_bytes is None else num_bytes) != wanted_bytes:
        raise InvalidArgument(
            f"{field}.data must hold {wanted_bytes} bytes for its shape and dtype", field=f"{field}.data"
        )
    if (scales := tensor.scales) or dtype in SCALED_DTYPES:
        _check_scales(scales, extents[0] if dtype in SCALED_DTYPES else 0, f"{field}.scales")


def _check_scales(raw: bytes, num_rows: int, field: str) -> None:
    if len(raw) != num_rows * SCALE_BYTES:
        raise InvalidArgument(f"{field} must hold one float32 per row for int8, else nothing", field=field)
    if not num_rows:
        return
    scales = memoryview(raw).cast("f")
    # A scale that is not finite shows in the sum, whatever `min` makes of it.
    if not (min(scales) > 0 and math.isfinite(sum(scales))):
        raise InvalidArgument(f"{field} must be finite and above zero", field=field)
