"""Between torch tensors and the wire, and which device and dtype a process computes in. The only module of this package
that may import torch.

Encoding copies once (into the message); decoding makes a view of the message's bytes, which is read-only by nature:
whoever wants to write copies first.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from moesaic.errors import InvalidArgument
from moesaic.v1 import common_pb2

if TYPE_CHECKING:
    from moesaic.settings import Device, DType

TORCH_DTYPES: dict[common_pb2.Dtype, torch.dtype] = {
    common_pb2.DTYPE_FLOAT32: torch.float32,
    common_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    common_pb2.DTYPE_FLOAT16: torch.float16,
}
WIRE_DTYPES: dict[torch.dtype, common_pb2.Dtype] = {
    torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()
}


def to_wire(tensor: torch.Tensor) -> common_pb2.Tensor:
    """A tensor of any device as a message. A dtype without a wire form is a KeyError: a bug of the caller."""
    rows = tensor.detach().cpu().contiguous()
    return common_pb2.Tensor(
        dtype=WIRE_DTYPES[rows.dtype],
        shape=list(rows.shape),
        data=rows.view(torch.uint8).numpy().tobytes(),
    )


def from_wire(message: common_pb2.Tensor) -> torch.Tensor:
    """A read-only view of the message's bytes. Check the message first (`codec.check_tensor`)."""
    shape, dtype = tuple(message.shape), TORCH_DTYPES[message.dtype]
    # Every access to the field copies it: one access.
    data = message.data
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def choose_device(device: Device) -> torch.device:
    """auto: CUDA where there is one. Raises InvalidArgument for CUDA where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("device: cuda is not available here", field="device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_dtype(dtype: DType, device: torch.device, stored: str) -> torch.dtype:
    """auto: bfloat16 on CUDA when the checkpoint is `stored` as bfloat16, else float32."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and stored == "bfloat16" else "float32"
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _hear_the_read_only_warning() -> None:
    """torch warns once a process that a view of bytes is read-only; we know, and hear it here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


_hear_the_read_only_warning()
