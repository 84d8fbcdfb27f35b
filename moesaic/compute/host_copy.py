"""Copies between the host's memory and the device that computes. Where that is the CPU, nothing is copied.

With CUDA tensors travel through pinned memory, so that no copy waits by itself: the device runs behind, and
`to_host` waits for it once, for all tensors together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device."""
    if device.type != "cuda":
        return tensor
    # torch does not hand pinned memory out again before the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device, complete and readable by the host; those of a GPU are contiguous."""
    if not tensors or tensors[0].device.type != "cuda":
        return list(tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies
