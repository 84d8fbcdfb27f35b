"""The expert maths: y = down(act(gate x) * up x), for all experts of one pass.

Rows lie in one tensor, grouped by expert; none is ever dropped. On a CPU the experts follow one another, each reading
its own run of rows: the bits of an answer depend on these rows alone, whichever worker holds the expert and whatever
lies beside it. On CUDA one grouped kernel serves all experts of a stack.
"""

# Shapes: D hidden size, F inner size, S experts of a stack, n rows of one expert, N rows of a pass.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_worker.device import to_device
from moesaic.errors import InvalidArgument
from moesaic.linear import Linear, WeightForm, check_form
from moesaic.settings import ExpertDType

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu}

# What the grouped kernel asks of every stride, and of the device.
_GROUPED_ALIGN_BYTES = 16
_GROUPED_MIN_CAPABILITY = (8, 0)
# From so many elements torch cuts an elementwise product into one piece a thread, and the last bits of exp() differ
# between the middle of a piece and its end.
_UNCUT_ELEMENTS = 32768


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """How the experts of a worker are held and computed. `dtype` is that of float weights and of what int8 widens to."""

    device: torch.device
    dtype: torch.dtype
    weights: WeightForm = "float"
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStack:
    """The weights of several experts of one layer side by side, as the grouped kernel reads them."""

    gate_up: Tensor  # [S, 2F, D]
    down: Tensor  # [S, D, F]


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """Maps rows [n, D] to rows [n, D]. With a stack, its weights are entry `index` there."""

    gate_up: Linear  # D -> 2F: gate outputs before up outputs
    down: Linear  # F -> D
    activation: str
    rows_at_once: int | None = None
    stack: ExpertStack | None = None
    index: int = 0

    @property
    def device(self) -> torch.device:
        return self.down.device

    @property
    def dtype(self) -> torch.dtype:
        """What it takes rows in without converting them, and gives them in."""
        return self.down.dtype

    @property
    def num_bytes(self) -> int:
        return self.gate_up.num_bytes + self.down.num_bytes

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, D], n > 0 -> [n, D] in fresh memory."""
        gate_up = self.gate_up(rows)
        if self.rows_at_once is None:
            return self.down(self._activate(gate_up))
        return self.down(torch.cat([self._activate(part) for part in gate_up.split(self.rows_at_once)]))

    def _activate(self, gate_up: Tensor) -> Tensor:
        """[n, 2F] -> [n, F]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[self.activation](gate).mul_(up)


def choose_form(
    expert_dtype: ExpertDType,
    device: torch.device,
    dtype: torch.dtype,
    *,
    hidden_size: int,
    inner_size: int,
    batch_invariant: bool,
) -> ExpertForm:
    """How to hold experts that are asked for as `expert_dtype` where everything else is computed in `dtype`.

    Raises InvalidArgument for what this device, or experts of this size, cannot have.
    """
    float_dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    weights: WeightForm = expert_dtype if expert_dtype in ("int8", "int4") else "float"
    try:
        check_form(weights, device, hidden_size, 2 * inner_size)
        check_form(weights, device, inner_size, hidden_size)
    except InvalidArgument as error:
        raise InvalidArgument(f"expert_dtype: {error.message}", field="expert_dtype") from error
    return ExpertForm(device, float_dtypes.get(expert_dtype, dtype), weights, batch_invariant)


def make_expert(
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    form: ExpertForm,
    stack: ExpertStack | None = None,
    index: int = 0,
) -> Expert:
    """An expert from its weights, gate_up [2F, D] and down [D, F], which it may keep or not."""
    inner_size = down.shape[1]
    return Expert(
        Linear(gate_up, form.weights, batch_invariant=form.batch_invariant),
        Linear(down, form.weights, batch_invariant=form.batch_invariant),
        activation,
        max(1, _UNCUT_ELEMENTS // inner_size) if form.batch_invariant else None,
        stack,
        index,
    )


def empty_stack(num_experts: int, *, hidden_size: int, inner_size: int, form: ExpertForm) -> ExpertStack:
    """Memory for the weights of several experts, to be filled by the loader."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=form.device, dtype=form.dtype)

    return ExpertStack(
        empty(num_experts, 2 * inner_size, hidden_size), empty(num_experts, hidden_size, inner_size)
    )


def can_stack(form: ExpertForm, *, hidden_size: int, inner_size: int) -> bool:
    """Whether the grouped kernel computes such experts here. Its tiles follow from all the rows of a pass."""
    row_bytes = {hidden_size * form.dtype.itemsize, inner_size * form.dtype.itemsize}
    return (
        form.device.type == "cuda"
        and form.dtype == torch.bfloat16
        and form.weights == "float"
        and not form.batch_invariant
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(form.device) >= _GROUPED_MIN_CAPABILITY
        and all(num_bytes % _GROUPED_ALIGN_BYTES == 0 for num_bytes in row_bytes)
    )


def compute_experts(experts: Sequence[Expert], rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Every expert's output for its own run of rows, n > 0 of them: rows [N, D] -> [N, D] in fresh memory."""
    stack = experts[0].stack
    if stack is not None and all(expert.stack is stack for expert in experts):
        return _compute_grouped(stack, experts, rows, counts)
    outputs = [expert(part) for expert, part in zip(experts, rows.split(list(counts)), strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _compute_grouped(
    stack: ExpertStack, experts: Sequence[Expert], rows: Tensor, counts: Sequence[int]
) -> Tensor:
    """One kernel for all. It wants the rows in the order of the stack."""
    order = sorted(range(len(experts)), key=lambda i: experts[i].index)
    if order != list(range(len(experts))):
        parts, ordered_counts = rows.split(list(counts)), [counts[i] for i in order]
        ordered = torch.cat([parts[i] for i in order])
        computed = _compute_grouped(stack, [experts[i] for i in order], ordered, ordered_counts)
        outputs = dict(zip(order, computed.split(ordered_counts), strict=True))
        return torch.cat([outputs[i] for i in range(len(order))])
    count_of = {expert.index: count for expert, count in zip(experts, counts, strict=True)}
    ends = list(accumulate(count_of.get(index, 0) for index in range(len(stack.gate_up))))
    offsets = to_device(torch.tensor(ends, dtype=torch.int32), rows.device)
    rows = rows.to(stack.gate_up.dtype)
    gate, up = F.grouped_mm(rows, stack.gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    activated = ACTIVATIONS[experts[0].activation](gate).mul_(up)
    return F.grouped_mm(activated, stack.down.transpose(1, 2), offs=offsets)
