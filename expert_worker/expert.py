"""The expert maths: y = down(act(gate x) * up x), for all experts of one pass at once.

Rows arrive grouped by expert, none is ever dropped. On a CPU every expert's rows are multiplied on their own, in fresh
memory, because the last bits of a small product depend on the alignment of its operands: so the same rows give the same
bits whichever worker holds the expert and whatever lies beside it. On CUDA one grouped kernel serves all experts.
"""

# Shapes: D hidden size, F inner size, S experts of a stack, n rows of one expert, N rows of a pass.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu}

# What the grouped kernel asks of every stride, and of the device.
_GROUPED_ALIGN_BYTES = 16
_GROUPED_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStack:
    """Memory for several experts of one layer side by side, as the grouped kernel reads it."""

    gate_up: Tensor  # [S, 2F, D]
    down: Tensor  # [S, D, F]


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """One expert's weights in the compute dtype; with a stack, views of its entry `index`."""

    gate_up: Tensor  # [2F, D]: gate rows above up rows
    down: Tensor  # [D, F]
    activation: str
    stack: ExpertStack | None = None
    index: int = 0

    @property
    def num_bytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes


def empty_experts(
    num_experts: int,
    *,
    hidden_size: int,
    inner_size: int,
    activation: str,
    device: torch.device,
    dtype: torch.dtype,
    stacked: bool,
) -> list[Expert]:
    """Memory for experts of one layer, to be filled by the loader: one stack, or separate and so aligned tensors."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    if not stacked:
        return [
            Expert(empty(2 * inner_size, hidden_size), empty(hidden_size, inner_size), activation)
            for _ in range(num_experts)
        ]
    stack = ExpertStack(
        empty(num_experts, 2 * inner_size, hidden_size), empty(num_experts, hidden_size, inner_size)
    )
    return [
        Expert(stack.gate_up[index], stack.down[index], activation, stack, index)
        for index in range(num_experts)
    ]


def can_stack(device: torch.device, dtype: torch.dtype, *, hidden_size: int, inner_size: int) -> bool:
    """Whether the grouped kernel computes such experts here."""
    row_bytes = {hidden_size * dtype.itemsize, inner_size * dtype.itemsize}
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(device) >= _GROUPED_MIN_CAPABILITY
        and all(num_bytes % _GROUPED_ALIGN_BYTES == 0 for num_bytes in row_bytes)
    )


def compute_experts(experts: Sequence[Expert], rows: Sequence[Tensor]) -> list[Tensor]:
    """Every expert's output [n, D] for its own rows [n, D], n > 0, in fresh memory and of the weights' dtype."""
    stack = experts[0].stack
    if stack is not None and all(expert.stack is stack for expert in experts):
        return _compute_grouped(stack, experts, rows)
    return [_compute_one(expert, x) for expert, x in zip(experts, rows, strict=True)]


def _compute_one(expert: Expert, x: Tensor) -> Tensor:
    gate, up = F.linear(x, expert.gate_up).chunk(2, dim=-1)
    return F.linear(ACTIVATIONS[expert.activation](gate) * up, expert.down)


def _compute_grouped(stack: ExpertStack, experts: Sequence[Expert], rows: Sequence[Tensor]) -> list[Tensor]:
    order = sorted(range(len(experts)), key=lambda i: experts[i].index)
    counts = torch.zeros(len(stack.gate_up), dtype=torch.int32)
    for i in order:
        counts[experts[i].index] = len(rows[i])
    ends = counts.cumsum(0, dtype=torch.int32).to(stack.gate_up.device)
    x = torch.cat([rows[i] for i in order])
    gate, up = F.grouped_mm(x, stack.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    activation = ACTIVATIONS[experts[0].activation]
    y = F.grouped_mm(activation(gate) * up, stack.down.transpose(1, 2), offs=ends)
    outputs = dict(zip(order, torch.split(y, [len(rows[i]) for i in order]), strict=True))
    return [outputs[i] for i in range(len(experts))]
