"""How much memory further experts may take on a device."""

from __future__ import annotations

import torch

from moesaic.machine_memory import read_memory

# What passes need for their rows, whatever else fits.
KEPT_FOR_PASSES = 128 << 20


def free_memory(device: torch.device) -> int:
    """The bytes of the device, or of this process's share of the machine, that weights may take now."""
    return max(0, _free(device) - KEPT_FOR_PASSES)


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return read_memory()[1]
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has taken from the device and does not use is free as well.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
