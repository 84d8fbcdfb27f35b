"""Between the device that the model runs on and host memory, where rows are sent from and land.

On a CPU both are the same and nothing happens. On a GPU whatever a layer sends comes over in one wait, and what came
back goes over without any, through pinned memory, which torch keeps for the next layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moesaic.compute.host_copy import to_host


class Staging(Protocol):
    def to_host(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Contiguous tensors of the device, on the host and complete."""
        ...

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Host memory for rows to land in."""
        ...

    def to_device(self, rows: Tensor) -> Tensor:
        """What landed, for the device to compute with."""
        ...


class HostStaging:
    """The model runs in host memory."""

    def to_host(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensor.contiguous() for tensor in tensors]

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def to_device(self, rows: Tensor) -> Tensor:
        return rows


class CudaStaging:
    """The model runs on a GPU, on the current stream of whoever calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_host(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return to_host(tensors)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_device(self, rows: Tensor) -> Tensor:
        # The memory is not handed out again before the copy is done: torch's pinned allocator sees to that.
        return rows.to(self._device, non_blocking=True)


def staging_for(device: torch.device) -> Staging:
    return CudaStaging(device) if device.type == "cuda" else HostStaging()
