"""The maths of the experts of one pass: y = down(act(up x)), or y = down(act(gate x) * up x) with a gate.

Rows lie in one tensor, grouped by expert; none is ever dropped. On a CPU the experts are computed one after
another, each from its own run of rows: the bits of an answer depend on these rows alone, whichever worker
holds the expert and whatever other rows are in the pass. On CUDA one grouped kernel computes all experts of a
stack, and there is one stack a layer unless more versions were loaded than it has rows to spare.

Shapes: D hidden size, F inner size, W outputs of the first product (2F with a gate, else F), S experts of a
stack, n rows of one expert, N rows of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expert_worker.experts.activation import Activation, choose_activation
from moesaic.compute.elementwise import CUT_GELU_ELEMENTS
from moesaic.compute.host_copy import to_device
from moesaic.compute.linear import INT4_GROUP, Linear, WeightForm, check_form
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


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StackRow:
    """Entry `index` of a stack. Who holds it has this entry for itself."""

    stack: ExpertWeights
    index: int

    @property
    def weights(self) -> ExpertWeights:
        return self.stack[self.index]


class Expert(Protocol):
    """What computes the rows of one expert. A kind of a third party may bring its own."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output, and of rows that need no conversion."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights in memory, in the form in which they are held."""
        ...

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, D] of any float dtype, n > 0 -> [n, D] in fresh memory. A row of the result must not depend
        on where its row lies among the others."""
        ...


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MlpExpert:
    """Maps rows [n, D] to rows [n, D]. An expert of a stack has its weights in `row`."""

    up: Linear  # D -> W
    down: Linear  # F -> D
    activate: Activation
    rows_at_once: int | None = None
    row: StackRow | None = None
    # The function that it computes, for those who make the expert again from its weights.
    module: ExpertModule | None = None

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
    form = ExpertForm(device, float_dtypes.get(expert_dtype, dtype), weights, batch_invariant)
    for module in modules:
        check_module(module, form)
    return form


def check_module(module: ExpertModule, form: ExpertForm) -> None:
    """Raises InvalidArgument with field `expert_dtype` if such experts cannot be held in this form."""
    try:
        check_form(form.weights, form.device, module.hidden_size, _up_width(module))
        check_form(form.weights, form.device, module.inner_size, module.hidden_size)
    except InvalidArgument as error:
        raise InvalidArgument(f"expert_dtype: {error.message}", field="expert_dtype") from error


def make_linear(weight: Tensor, bias: Tensor | None, form: ExpertForm) -> Linear:
    """One of the two products of an expert. It may keep the tensors or copy them."""
    return Linear(weight, form.weights, bias, batch_invariant=form.batch_invariant)


def assemble_expert(
    up: Linear,
    down: Linear,
    module: ExpertModule,
    form: ExpertForm,
    row: StackRow | None = None,
) -> MlpExpert:
    return MlpExpert(
        up,
        down,
        choose_activation(module, row_by_row=form.batch_invariant),
        max(1, CUT_GELU_ELEMENTS // module.inner_size) if form.batch_invariant else None,
        row,
        module,
    )


def make_expert(
    weights: ExpertWeights,
    module: ExpertModule,
    form: ExpertForm,
    row: StackRow | None = None,
) -> MlpExpert:
    """An expert from its weights, which it may keep or copy."""
    up = make_linear(weights.up, weights.up_bias, form)
    down = make_linear(weights.down, weights.down_bias, form)
    return assemble_expert(up, down, module, form, row)


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


def held_bytes(module: ExpertModule, form: ExpertForm) -> int:
    """The bytes that an expert of this module takes in this form at most."""
    weight_bits = {"float": 8 * form.dtype.itemsize, "int8": 8, "int4": 4}[form.weights]
    matrices = module.inner_size * module.hidden_size * (3 if module.gated else 2)
    num_rows = _up_width(module) + module.hidden_size
    # Scales and biases take a few bytes a row; in int4 every group has a scale and a zero.
    scales = 4 * matrices // INT4_GROUP if form.weights == "int4" else 4 * num_rows
    return matrices * weight_bits // 8 + scales + 4 * num_rows * module.biased


def row_dtype(experts: Sequence[Expert]) -> torch.dtype:
    """The dtype in which rows are handed to all of these experts: their own, or one that holds those of each."""
    dtypes = {expert.dtype for expert in experts}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def compute_experts(experts: Sequence[Expert], rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Every expert's output for its own run of n > 0 rows: rows [N, D] -> [N, D] in fresh memory.

    The experts of a stack are computed together. An expert that lies in no stack is computed by itself.
    """
    stacks = [_stack_of(expert) for expert in experts]
    if stacks[0] is not None and all(stack is stacks[0] for stack in stacks):
        return _compute_grouped(stacks[0], cast(Sequence[MlpExpert], experts), rows, counts)
    parts = rows.split(list(counts))
    if any(stack is not None for stack in stacks):
        return _compute_by_stack(stacks, experts, parts)
    outputs = [expert(part) for expert, part in zip(experts, parts, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _stack_of(expert: Expert) -> ExpertWeights | None:
    return expert.row.stack if isinstance(expert, MlpExpert) and expert.row is not None else None


def _compute_by_stack(
    stacks: Sequence[ExpertWeights | None], experts: Sequence[Expert], parts: Sequence[Tensor]
) -> Tensor:
    """One kernel for each stack, and the experts without one after another."""
    indices: dict[ExpertWeights | Expert, list[int]] = {}
    for i, (stack, expert) in enumerate(zip(stacks, experts, strict=True)):
        indices.setdefault(expert if stack is None else stack, []).append(i)
    outputs: dict[int, Tensor] = {}
    for its in indices.values():
        counts = [len(parts[i]) for i in its]
        computed = compute_experts([experts[i] for i in its], torch.cat([parts[i] for i in its]), counts)
        outputs.update(zip(its, computed.split(counts), strict=True))
    return torch.cat([outputs[i] for i in range(len(experts))])


def _compute_grouped(
    stack: ExpertWeights, experts: Sequence[MlpExpert], rows: Tensor, counts: Sequence[int]
) -> Tensor:
    """All experts in one kernel, which needs the rows in the order of the stack."""
    indices = [expert.row.index for expert in experts if expert.row is not None]
    order = sorted(range(len(experts)), key=indices.__getitem__)
    if order != list(range(len(experts))):
        parts, ordered_counts = rows.split(list(counts)), [counts[i] for i in order]
        ordered = torch.cat([parts[i] for i in order])
        computed = _compute_grouped(stack, [experts[i] for i in order], ordered, ordered_counts)
        outputs = dict(zip(order, computed.split(ordered_counts), strict=True))
        return torch.cat([outputs[i] for i in range(len(order))])
    count_of = dict(zip(indices, counts, strict=True))
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
