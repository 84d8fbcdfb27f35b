"""Conversion between torch tensors and the wire. Of this package, only `moesaic.compute` imports torch beside it.

Encoding makes rows whose bytes are the data. Decoding makes a view of the bytes that arrived; it is read-only, and a
caller that writes copies it first. int8 rows travel with one float32 scale each.

Shapes: R rows, D their width.
"""

from __future__ import annotations

import warnings

import torch

from moesaic.v1 import common_pb2
from moesaic.wire.tensor_check import SCALED_DTYPES

# The element types of rows on the wire, and the same table the other way round.
TORCH_DTYPES: dict[common_pb2.Dtype, torch.dtype] = {
    common_pb2.DTYPE_FLOAT32: torch.float32,
    common_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    common_pb2.DTYPE_FLOAT16: torch.float16,
    common_pb2.DTYPE_INT8: torch.int8,
}
WIRE_DTYPES: dict[torch.dtype, common_pb2.Dtype] = {
    torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()
}
# The largest element of an int8 row.
LARGEST_INT8 = 127.0
# A row without a larger element counts as a row of zeros: its scale would lose precision, or become zero.
SMALLEST_EXTREME = 1e-30


def encode_rows(rows: torch.Tensor, dtype: common_pb2.Dtype) -> tuple[common_pb2.Tensor, torch.Tensor]:
    """Rows [R, D] of any device in a dtype of the wire: the header, without data, and the contiguous CPU rows
    whose bytes (`data_of`) are the data. Rows that already have this form are not copied."""
    wire, scales = narrow(rows.detach(), dtype)
    wire = wire.cpu().contiguous()
    return header_of(wire, scales), wire


def narrow(rows: torch.Tensor, dtype: common_pb2.Dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [R, D] in a dtype of the wire, and their scales [R] in float32 if the dtype has scales.

    A row that is not finite gets a scale that is not finite: its elements may turn into any number, so the
    receiver checks the scale."""
    if dtype not in SCALED_DTYPES:
        return rows.to(TORCH_DTYPES[dtype]), None
    rows = rows.float()
    extreme = rows.abs().amax(dim=1)
    # Slightly below the exact fit, so that the largest number does not become infinite when it is decoded.
    scales = extreme * ((1 - 2**-22) / LARGEST_INT8)
    scales = torch.where(extreme < SMALLEST_EXTREME, 1.0, scales)
    scaled = (rows / scales[:, None]).clamp_(-LARGEST_INT8, LARGEST_INT8)
    return scaled.round_().to(torch.int8), scales


def header_of(rows: torch.Tensor, scales: torch.Tensor | None = None) -> common_pb2.Tensor:
    """The message of a tensor in a dtype of the wire, without its data."""
    header = common_pb2.Tensor(dtype=WIRE_DTYPES[rows.dtype], shape=rows.shape)
    if scales is not None:
        header.scales = scales.cpu().numpy().tobytes()
    return header


def data_of(rows: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return rows.view(torch.uint8).numpy().data.cast("B") if rows.numel() else memoryview(b"")


def view_rows(header: common_pb2.Tensor, data: memoryview) -> torch.Tensor:
    """Rows in a dtype of the wire, a read-only view of `data`, whose header `check_tensor` has passed."""
    shape, dtype = tuple(header.shape), TORCH_DTYPES[header.dtype]
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def decode_rows(header: common_pb2.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The numbers that the rows of a checked header stand for: float32 for scaled rows, else the rows."""
    if header.dtype not in SCALED_DTYPES:
        return rows
    scales = torch.frombuffer(header.scales, dtype=torch.float32).to(rows.device)
    return rows.float() * scales[:, None]


def _spend_the_read_only_warning() -> None:
    """torch warns once per process that a view of bytes is read-only. The views here are meant to be, so the
    warning is provoked and suppressed when this module is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


_spend_the_read_only_warning()
