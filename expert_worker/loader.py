"""From a checkpoint to experts in memory: only the slices of this worker, one expert at a time.

Each expert's bytes are hashed into its version exactly as they lie on disk, checked to be finite, and copied in the
compute dtype. The files are mapped for one expert only, so that neither they nor a second copy of the share ever count
in this process's memory.
"""

# Shapes: D hidden size, F inner size.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expert_worker.expert import Expert, can_stack, empty_experts
from expert_worker.expert_store import HeldExpert
from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel, WeightSlice
from moesaic.manifest import ExpertAddress, VersionHasher


def load_experts(
    checkpoint: Checkpoint,
    model: MoeModel,
    addresses: Iterable[ExpertAddress],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[ExpertAddress, HeldExpert]]:
    """Loads the experts in order of layer and slot. Raises CheckpointError that names the tensor at fault."""
    stacked = can_stack(device, dtype, hidden_size=model.hidden_size, inner_size=model.inner_size)
    for _, layer_addresses in groupby(sorted(addresses), key=lambda address: address.layer):
        group = list(layer_addresses)
        experts = empty_experts(
            len(group),
            hidden_size=model.hidden_size,
            inner_size=model.inner_size,
            activation=model.activation,
            device=device,
            dtype=dtype,
            stacked=stacked,
        )
        for address, expert in zip(group, experts, strict=True):
            yield address, HeldExpert(_fill(expert, checkpoint, model, address), expert)


def _fill(expert: Expert, checkpoint: Checkpoint, model: MoeModel, address: ExpertAddress) -> bytes:
    """Copies the weights of one expert into its memory; returns its version."""
    gate, up = expert.gate_up.chunk(2)
    targets = {"gate": gate, "up": up, "down": expert.down}
    hasher = VersionHasher(f"swiglu {model.activation}", model.dtype)
    with ExitStack() as files:
        for weight, where in model.expert_weights(address.layer, address.slot).items():
            stored = _map_weight(files, checkpoint, where)
            _check_finite(stored, where)
            hasher.update(weight, tuple(stored.shape), _raw_bytes(stored))
            targets[weight].copy_(stored)
            del stored
    return hasher.digest()


def _map_weight(files: ExitStack, checkpoint: Checkpoint, where: WeightSlice) -> Tensor:
    """A read-only view into the mapped file, in the stored dtype: [F, D] or [D, F]."""
    entry = checkpoint.tensors[where.tensor]
    try:
        file = files.enter_context(safe_open(entry.file, framework="pt"))
        tensor = file.get_slice(where.tensor)
        rows = slice(*where.rows) if where.rows is not None else slice(None)
        view: Tensor = tensor[rows] if where.index is None else tensor[where.index, rows]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{entry.file.name}: cannot be read", field=entry.file.name) from error
    return view


def _raw_bytes(stored: Tensor) -> memoryview:
    return stored.reshape(-1).view(torch.uint8).numpy().data


def _check_finite(stored: Tensor, where: WeightSlice) -> None:
    # Two numbers tell: the extremes of a tensor with NaN are NaN.
    if not all(extreme.isfinite().item() for extreme in torch.aminmax(stored)):
        raise CheckpointError(f"tensor {where.tensor} holds NaN or infinity", field=where.tensor)
