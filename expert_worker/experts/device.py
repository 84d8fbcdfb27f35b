"""Between the host's memory and the device that computes. Where that is the CPU, nothing moves.

With CUDA rows travel through pinned memory, so that no copy waits: the device runs behind, and a pass waits for it once,
when its answers are complete.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device."""
    if device.type != "cuda":
        return tensor
    # torch keeps pinned memory back until the copy is through.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device, complete and readable by the host."""
    if not tensors or tensors[0].device.type != "cuda":
        return list(tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies
