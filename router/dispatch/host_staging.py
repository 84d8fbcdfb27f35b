"""Copies between the model's device and host memory, in which rows are sent and received.

On a CPU both are the same and nothing is copied. On a GPU all tensors that a layer sends are copied with a
single wait, and the answers are copied back without any, through pinned memory that torch keeps for the next
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moesaic.compute.host_copy import to_host


class Staging(Protocol):
    """What the dispatcher needs of a device."""

    def to_host(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors of the device on the host, contiguous and complete."""
        ...

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Host memory for the rows of the answers."""
        ...

    def to_device(self, rows: Tensor) -> Tensor:
        """Received rows on the device."""
        ...


class HostStaging:
    """The model runs in host memory: nothing is copied."""

    def to_host(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensor.contiguous() for tensor in tensors]

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def to_device(self, rows: Tensor) -> Tensor:
        return rows


class CudaStaging:
    """The model runs on a GPU. Copies run on the caller's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_host(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return to_host(tensors)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_device(self, rows: Tensor) -> Tensor:
        # torch's pinned allocator does not reuse the memory before the copy is done.
        return rows.to(self._device, non_blocking=True)


def staging_for(device: torch.device) -> Staging:
    return CudaStaging(device) if device.type == "cuda" else HostStaging()
