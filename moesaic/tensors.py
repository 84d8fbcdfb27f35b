"""Between torch tensors and the wire. The only module of this package that may import torch.

Encoding copies once (into the message); decoding makes a view of the message's bytes, which is read-only by nature:
whoever wants to write copies first.
"""

from __future__ import annotations

import warnings

import torch

from moesaic.v1 import common_pb2

TORCH_DTYPES: dict[common_pb2.DType, torch.dtype] = {
    common_pb2.DTYPE_FLOAT32: torch.float32,
    common_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    common_pb2.DTYPE_FLOAT16: torch.float16,
}
WIRE_DTYPES: dict[torch.dtype, common_pb2.DType] = {
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
    if not message.data:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(message.data, dtype=dtype).view(shape)
