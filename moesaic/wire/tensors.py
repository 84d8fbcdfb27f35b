"""Conversion between torch tensors and the wire. Beside `moesaic.compute`, no other module of the package imports torch.
that may import torch.

Encoding makes rows whose bytes are the data, decoding a view of the bytes that came, which is read-only by nature:
whoever wants to write copies first. Rows of int8 and float8 travel with one float32 scale each.
"""

# Shapes: R rows, D their width.

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from moesaic.v1 import common_pb2

if TYPE_CHECKING:
    pass

TORCH_DTYPES: dict[common_pb2.Dtype, torch.dtype] = {
    common_pb2.DTYPE_FLOAT32: torch.float32,
    common_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    common_pb2.DTYPE_FLOAT16: torch.float16,
}
# Element types of rows on the wire; those beyond TORCH_DTYPES come with a scale a row.
WIRE_ROWS: dict[common_pb2.Dtype, torch.dtype] = TORCH_DTYPES | {
    common_pb2.DTYPE_INT8: torch.int8,
    common_pb2.DTYPE_FLOAT8_E4M3: torch.float8_e4m3fn,
}
WIRE_DTYPES: dict[torch.dtype, common_pb2.Dtype] = {
    torch_dtype: dtype for dtype, torch_dtype in WIRE_ROWS.items()
}
# The largest element of a scaled row.
LARGEST: dict[common_pb2.Dtype, float] = {common_pb2.DTYPE_INT8: 127.0, common_pb2.DTYPE_FLOAT8_E4M3: 448.0}
# A row that has nothing larger is a row of zeros: its scale would lose its precision, and then be zero.
SMALLEST_EXTREME = 1e-30


def encode_rows(rows: torch.Tensor, dtype: common_pb2.Dtype) -> tuple[common_pb2.Tensor, torch.Tensor]:
    """Rows [R, D] of any device as `dtype` puts them on the wire: the header, without data, and the contiguous CPU rows
    whose bytes (`data_of`) the data are. Rows that are so already are not copied."""
    wire, scales = narrow(rows.detach(), dtype)
    wire = wire.cpu().contiguous()
    return header_of(wire, scales), wire


def narrow(rows: torch.Tensor, dtype: common_pb2.Dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """rows [R, D] in a dtype of the wire, and scales [R] in float32 where it has some.

    A row that is not finite has a scale that is not: its elements may turn into any number, so the scale is what the
    other side checks."""
    if dtype in TORCH_DTYPES:
        return rows.to(TORCH_DTYPES[dtype]), None
    rows = rows.float()
    extreme = rows.abs().amax(dim=1)
    # A little less than what just fits, so that the largest number does not become infinite on its way back.
    scales = extreme * ((1 - 2**-22) / LARGEST[dtype])
    scales = torch.where(extreme < SMALLEST_EXTREME, 1.0, scales)
    scaled = (rows / scales[:, None]).clamp_(-LARGEST[dtype], LARGEST[dtype])
    if dtype == common_pb2.DTYPE_INT8:
        scaled.round_()
    return scaled.to(WIRE_ROWS[dtype]), scales


def header_of(rows: torch.Tensor, scales: torch.Tensor | None = None) -> common_pb2.Tensor:
    """The message of a tensor in a dtype of the wire, without its data."""
    header = common_pb2.Tensor(dtype=WIRE_DTYPES[rows.dtype], shape=rows.shape)
    if scales is not None:
        header.scales = scales.cpu().numpy().tobytes()
    return header


def data_of(rows: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return rows.view(torch.uint8).numpy().data.cast("B") if rows.numel() else memoryview(b"")


def view_rows(header: common_pb2.Tensor, data: memoryview) -> torch.Tensor:
    """Rows in a dtype of the wire, a read-only view of `data`. Check the header first (`codec.check_tensor`)."""
    shape, dtype = tuple(header.shape), WIRE_ROWS[header.dtype]
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def decode_rows(header: common_pb2.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The numbers that the rows of a checked header stand for: as they are, or float32 where they have scales."""
    if header.dtype in TORCH_DTYPES:
        return rows
    scales = torch.frombuffer(header.scales, dtype=torch.float32).to(rows.device)
    return rows.float() * scales[:, None]


def _hear_the_read_only_warning() -> None:
    """torch warns once a process that a view of bytes is read-only; we know, and hear it here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


_hear_the_read_only_warning()
