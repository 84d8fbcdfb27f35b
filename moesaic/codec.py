"""Tensors on the wire: raw little-endian bytes with dtype and shape. No torch here; `tensors.py` makes the views.

Whoever receives a tensor checks it before touching its bytes: dtype, shape and byte count by what the manifest
promises, so that a wrong message is an error with a field name and never a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from moesaic.errors import InvalidArgument
from moesaic.v1 import common_pb2

ITEM_BYTES: dict[common_pb2.Dtype, int] = {
    common_pb2.DTYPE_FLOAT32: 4,
    common_pb2.DTYPE_BFLOAT16: 2,
    common_pb2.DTYPE_FLOAT16: 2,
}


def dtype_name(dtype: common_pb2.Dtype) -> str:
    """`DTYPE_BFLOAT16` -> `bfloat16`."""
    return common_pb2.Dtype.Name(dtype).removeprefix("DTYPE_").lower()


def check_tensor(
    tensor: common_pb2.Tensor,
    *,
    field: str,
    dtypes: Collection[common_pb2.Dtype],
    shape: Sequence[int | None],
) -> None:
    """Raises InvalidArgument unless the tensor has one of `dtypes`, `shape` (None: any extent) and just its bytes."""
    if tensor.dtype not in dtypes:
        expected = ", ".join(dtype_name(dtype) for dtype in dtypes)
        raise InvalidArgument(f"{field}.dtype must be one of: {expected}", field=f"{field}.dtype")
    if len(tensor.shape) != len(shape) or any(
        want is not None and got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        expected = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InvalidArgument(f"{field}.shape must be [{expected}]", field=f"{field}.shape")
    num_bytes = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    if len(tensor.data) != num_bytes:
        raise InvalidArgument(
            f"{field}.data must hold {num_bytes} bytes for its shape and dtype", field=f"{field}.data"
        )
