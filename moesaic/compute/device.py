"""The device and the dtype that a process computes with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moesaic.errors import InvalidArgument

if TYPE_CHECKING:
    from moesaic.settings import Device, DType


def choose_device(device: Device) -> torch.device:
    """The device for a setting; `auto` is CUDA if there is one. Raises InvalidArgument for CUDA without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("device: cuda is not available here", field="device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_dtype(dtype: DType, device: torch.device, stored: str) -> torch.dtype:
    """The dtype for a setting; `auto` is bfloat16 on CUDA for a checkpoint `stored` so, else float32."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and stored == "bfloat16" else "float32"
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32
