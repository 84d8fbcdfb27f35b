"""From a checkpoint to experts in memory: only the slices of this worker, one expert at a time.

Each expert's bytes are hashed into its version exactly as they lie on disk, checked to be finite, and laid out or
quantised as they will be read. The files are mapped for one expert only, so that neither they nor a second copy of the
share ever count in this process's memory.
"""

# Shapes: D hidden size, F inner size.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expert_worker.expert import ExpertForm, ExpertStack, can_stack, empty_stack, make_expert
from expert_worker.expert_store import HeldExpert
from moesaic.checkpoint import Checkpoint
from moesaic.errors import CheckpointError
from moesaic.families import MoeModel, WeightSlice
from moesaic.manifest import ExpertAddress, VersionHasher


def load_experts(
    checkpoint: Checkpoint, model: MoeModel, addresses: Iterable[ExpertAddress], form: ExpertForm
) -> Iterator[tuple[ExpertAddress, HeldExpert]]:
    """Loads the experts in order of layer and slot. Raises CheckpointError that names the tensor at fault."""
    sizes = {"hidden_size": model.hidden_size, "inner_size": model.inner_size}
    stacked = can_stack(form, **sizes)
    for _, layer_addresses in groupby(sorted(addresses), key=lambda address: address.layer):
        group = list(layer_addresses)
        stack = empty_stack(len(group), form=form, **sizes) if stacked else None
        for index, address in enumerate(group):
            yield address, _load_expert(checkpoint, model, address, form, stack, index)


def expert_memory(
    model: MoeModel, form: ExpertForm, stack: ExpertStack | None, index: int
) -> tuple[Tensor, Tensor]:
    """Where the weights of an expert are put, [2F, D] and [D, F]: its entry of the stack, or memory of its own."""
    if stack is not None:
        return stack.gate_up[index], stack.down[index]
    shapes = (2 * model.inner_size, model.hidden_size), (model.hidden_size, model.inner_size)
    gate_up, down = (torch.empty(shape, device=form.device, dtype=form.dtype) for shape in shapes)
    return gate_up, down


def _load_expert(
    checkpoint: Checkpoint,
    model: MoeModel,
    address: ExpertAddress,
    form: ExpertForm,
    stack: ExpertStack | None,
    index: int,
) -> HeldExpert:
    gate_up, down = expert_memory(model, form, stack, index)
    version = _fill(gate_up, down, checkpoint, model, address)
    return HeldExpert(version, make_expert(gate_up, down, model.activation, form, stack, index))


def _fill(
    gate_up: Tensor, down: Tensor, checkpoint: Checkpoint, model: MoeModel, address: ExpertAddress
) -> bytes:
    """Copies the weights of one expert, gate above up; returns its version."""
    gate, up = gate_up.chunk(2)
    targets = {"gate": gate, "up": up, "down": down}
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
