"""A tensor on the host as bytes, whatever its layout, and a tensor that lies in bytes which somebody else keeps.

Weights that oneDNN has laid out for itself have no storage that Python can see. torch can tell where their bytes lie and
how they are to be read, and makes a tensor of both again, which copies nothing: it does so for the programs that its
compiler makes ahead of time, through the functions of C that they are linked with. As other kernels here, this is tried
on a small weight before it is used.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
}
_PROBE_SHAPE = (64, 96)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """How the bytes of a tensor are to be read."""

    dtype: str
    shape: tuple[int, ...]
    # oneDNN's own description of its layout; empty for numbers that lie row by row.
    packed: bytes = b""


def layout_of(tensor: Tensor) -> TensorLayout:
    """The layout of a contiguous tensor on the host, or of one that oneDNN has laid out."""
    packed = b""
    if tensor.is_mkldnn:
        packed = torch.ops.mkldnn._get_mkldnn_serialized_md(tensor).numpy().tobytes()
    return TensorLayout(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), packed)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor that has a layout. They are valid as long as the tensor."""
    if tensor.is_mkldnn:
        address, num_bytes = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    else:
        address, num_bytes = tensor.data_ptr(), tensor.nbytes
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(address)).cast("B")


def view_bytes(memory: memoryview, layout: TensorLayout) -> Tensor:
    """A tensor of this layout that lies in `memory`, which stays as long as the tensor. Nobody may write to it.

    Raises RuntimeError when torch refuses the layout, ValueError for a dtype that is unknown or too few bytes.
    """
    dtype = _DTYPES.get(layout.dtype)
    if dtype is None:
        raise ValueError(f"no tensor has dtype {layout.dtype}")
    tensor = _create(np.frombuffer(memory, np.uint8).ctypes.data, dtype, layout)
    needed = torch.ops.mkldnn._nbytes(tensor) if layout.packed else tensor.nbytes
    if needed > memory.nbytes:
        raise ValueError(f"{needed} bytes are needed, {memory.nbytes} are there")
    weakref.finalize(tensor, _let_go, memory).atexit = False
    return tensor


@lru_cache
def probe_layout() -> bytes | None:
    """What oneDNN makes of a small weight in this process, which tells its version and the CPU apart; None where packed
    tensors cannot be viewed."""
    try:
        weight = torch.randn(_PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        viewed = view_bytes(memoryview(bytes(bytes_of(packed))), layout_of(packed))
        if not torch.equal(_probe_product(viewed), _probe_product(packed)):
            raise RuntimeError("its products are others")
        gone = weakref.ref(viewed)
        del viewed
        if gone() is not None:
            raise RuntimeError("its memory is never let go")
        return layout_of(packed).packed
    except (RuntimeError, AttributeError, TypeError, ValueError, OSError) as error:
        log.warning("packed weights cannot be viewed here", extra={"fields": {"why": str(error)[:200]}})
        return None


def _probe_product(weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        torch.ones(2, weight.shape[1]), weight, None, "none", [], ""
    )
    return product


def _let_go(memory: memoryview) -> None:
    """Called when the tensor is gone: until then the finalizer has kept the memory."""


def _create(address: int, dtype: torch.dtype, layout: TensorLayout) -> Tensor:
    library = _library()
    rank = len(layout.shape)
    handle = ctypes.c_void_p()
    kind = library.aoti_torch_layout__mkldnn() if layout.packed else library.aoti_torch_layout_strided()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(address),
        ctypes.c_int64(rank),
        (ctypes.c_int64 * rank)(*layout.shape),
        (ctypes.c_int64 * rank)(*_row_by_row(layout.shape)),
        ctypes.c_int64(0),
        ctypes.c_int32(getattr(library, f"aoti_torch_dtype_{layout.dtype}")()),
        ctypes.c_int32(library.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(kind),
        layout.packed,
        ctypes.c_int64(len(layout.packed)),
    )
    if failed:
        raise RuntimeError("torch refuses the layout")
    # Of the functions that turn handles into tensors this one alone takes the handle's reference over.
    (tensor,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle)])
    assert tensor.dtype == dtype
    return tensor


def _row_by_row(shape: tuple[int, ...]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


@lru_cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _capsule(handle: ctypes.c_void_p) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(handle, None, None)
