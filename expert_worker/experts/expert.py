"""The maths of the experts of one pass: y = down(act(up x)), or y = down(act(gate x) * up x) with a gate.

Rows lie in one tensor, grouped by expert; none is ever dropped. On a CPU the experts are computed one after
another, each from its own run of rows: the bits of an answer depend on these rows alone, whichever worker
holds the expert and whatever other rows are in the pass. On CUDA one grouped kernel computes all experts of a
stack.

Shapes: D hidden size, F inner size, W outputs of the first product (2F with a gate, else F), S experts of a
stack, n rows of one expert, N rows of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expert_worker.experts.activation import Activation, choose_activation
from moesaic.compute.elementwise import CUT_GELU_ELEMENTS
from moesaic.compute.host_copy import to_device
from moesaic.compute.linear import Linear, WeightForm, check_form
from moesaic.errors import InvalidArgument
from moesaic.families.model import ExpertModule
from moesaic.settings import ExpertDType

# The grouped kernel needs strides that are multiples of this, and a device of at least this capability.
_GROUPED_ALIGN_BYTES = 16
_GROUPED_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """How the experts of a worker are held and computed.

    `dtype` is the dtype of float weights, and the one that int8 weights are widened to.
    """

    device: torch.device
    dtype: torch.dtype
    weights: WeightForm = "float"
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """The weights of one expert, or of a stack of experts with one more dimension in front."""

    up: Tensor  # [W, D]: gate rows before up rows
    down: Tensor  # [D, F]
    up_bias: Tensor | None = None  # [W]
    down_bias: Tensor | None = None  # [D]

    def __getitem__(self, index: int) -> ExpertWeights:
        """The weights of one expert of a stack."""
        up_bias, down_bias = (
            None if bias is None else bias[index] for bias in (self.up_bias, self.down_bias)
        )
        return ExpertWeights(self.up[index], self.down[index], up_bias, down_bias)


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """Maps rows [n, D] to rows [n, D]. An expert of a stack has its weights in entry `index` there."""

    up: Linear  # D -> W
    down: Linear  # F -> D
    activate: Activation
    rows_at_once: int | None = None
    stack: ExpertWeights | None = None
    index: int = 0

    @property
    def device(self) -> torch.device:
        return self.down.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output, and of rows that need no conversion."""
        return self.down.dtype

    @property
    def num_bytes(self) -> int:
        return self.up.num_bytes + self.down.num_bytes

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, D], n > 0 -> [n, D] in fresh memory."""
        up = self.up(rows)
        if self.rows_at_once is None:
            return self.down(self.activate(up))
        return self.down(torch.cat([self.activate(part) for part in up.split(self.rows_at_once)]))


def choose_form(
    expert_dtype: ExpertDType,
    device: torch.device,
    dtype: torch.dtype,
    modules: Iterable[ExpertModule],
    *,
    batch_invariant: bool,
) -> ExpertForm:
    """The form for the setting `expert_dtype`; `auto` is `dtype`, in which everything else is computed.

    Raises InvalidArgument for a form that this device or one of these modules does not support.
    """
    float_dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    weights: WeightForm = expert_dtype if expert_dtype in ("int8", "int4") else "float"
    try:
        for module in modules:
            check_form(weights, device, module.hidden_size, _up_width(module))
            check_form(weights, device, module.inner_size, module.hidden_size)
    except InvalidArgument as error:
        raise InvalidArgument(f"expert_dtype: {error.message}", field="expert_dtype") from error
    return ExpertForm(device, float_dtypes.get(expert_dtype, dtype), weights, batch_invariant)


def make_linear(weight: Tensor, bias: Tensor | None, form: ExpertForm) -> Linear:
    """One of the two products of an expert. It may keep the tensors or copy them."""
    return Linear(weight, form.weights, bias, batch_invariant=form.batch_invariant)


def assemble_expert(
    up: Linear,
    down: Linear,
    module: ExpertModule,
    form: ExpertForm,
    stack: ExpertWeights | None = None,
    index: int = 0,
) -> Expert:
    return Expert(
        up,
        down,
        choose_activation(module, row_by_row=form.batch_invariant),
        max(1, CUT_GELU_ELEMENTS // module.inner_size) if form.batch_invariant else None,
        stack,
        index,
    )


def make_expert(
    weights: ExpertWeights,
    module: ExpertModule,
    form: ExpertForm,
    stack: ExpertWeights | None = None,
    index: int = 0,
) -> Expert:
    """An expert from its weights, which it may keep or copy."""
    up = make_linear(weights.up, weights.up_bias, form)
    down = make_linear(weights.down, weights.down_bias, form)
    return assemble_expert(up, down, module, form, stack, index)


def empty_weights(module: ExpertModule, form: ExpertForm, num_experts: int | None = None) -> ExpertWeights:
    """Uninitialised memory for the weights of one expert, or of a stack of experts."""
    stacked = () if num_experts is None else (num_experts,)

    def empty(*shape: int) -> Tensor:
        return torch.empty(stacked + shape, device=form.device, dtype=form.dtype)

    width = _up_width(module)
    return ExpertWeights(
        empty(width, module.hidden_size),
        empty(module.hidden_size, module.inner_size),
        empty(width) if module.biased else None,
        empty(module.hidden_size) if module.biased else None,
    )


def can_stack(form: ExpertForm, module: ExpertModule) -> bool:
    """Whether the grouped kernel computes such experts here. Its tiles depend on all rows of a pass."""
    row_bytes = {size * form.dtype.itemsize for size in (module.hidden_size, module.inner_size)}
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
    """Every expert's output for its own run of n > 0 rows: rows [N, D] -> [N, D] in fresh memory."""
    stack = experts[0].stack
    if stack is not None and all(expert.stack is stack for expert in experts):
        return _compute_grouped(stack, experts, rows, counts)
    outputs = [expert(part) for expert, part in zip(experts, rows.split(list(counts)), strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _compute_grouped(
    stack: ExpertWeights, experts: Sequence[Expert], rows: Tensor, counts: Sequence[int]
) -> Tensor:
    """All experts in one kernel, which needs the rows in the order of the stack."""
    order = sorted(range(len(experts)), key=lambda i: experts[i].index)
    if order != list(range(len(experts))):
        parts, ordered_counts = rows.split(list(counts)), [counts[i] for i in order]
        ordered = torch.cat([parts[i] for i in order])
        computed = _compute_grouped(stack, [experts[i] for i in order], ordered, ordered_counts)
        outputs = dict(zip(order, computed.split(ordered_counts), strict=True))
        return torch.cat([outputs[i] for i in range(len(order))])
    count_of = {expert.index: count for expert, count in zip(experts, counts, strict=True)}
    all_counts = [count_of.get(index, 0) for index in range(len(stack.up))]
    offsets = to_device(torch.tensor(list(accumulate(all_counts)), dtype=torch.int32), rows.device)
    up = F.grouped_mm(rows.to(stack.up.dtype), stack.up.transpose(1, 2), offs=offsets)
    if stack.up_bias is None or stack.down_bias is None:
        return F.grouped_mm(experts[0].activate(up), stack.down.transpose(1, 2), offs=offsets)
    of_row = to_device(torch.from_numpy(np.repeat(np.arange(len(all_counts)), all_counts)), rows.device)
    up.add_(stack.up_bias.index_select(0, of_row))
    down = F.grouped_mm(experts[0].activate(up), stack.down.transpose(1, 2), offs=offsets)
    return down.add_(stack.down_bias.index_select(0, of_row))


def _up_width(module: ExpertModule) -> int:
    return 2 * module.inner_size if module.gated else module.inner_size
