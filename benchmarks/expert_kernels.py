"""Every way to compute an expert, and what batch invariance costs.

Measured are the time by rows with cold weights, the bytes read per second, the error against float32, and the
effect of each form of the weights on a model's logits and perplexity. Many copies of an expert are used in
turn, over more memory than any cache holds, as a model does that reads its layers in turn.

Shapes: n rows, D hidden size, F inner size.

Run: python benchmarks/expert_kernels.py [--threads 2] [--text FILE] [--no-model-error]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from expert_error import Error, measure_errors
from harness import options
from harness.result import Table, conclude
from torch import Tensor

from expert_worker.experts import allocator
from expert_worker.experts.expert import (
    ExpertForm,
    ExpertWeights,
    StackRow,
    compute_experts,
    empty_weights,
    make_expert,
)
from moesaic.compute.linear import ROW_TILE
from moesaic.families.model import ExpertModule

HIDDEN, INNER = 1024, 3584
COLD_BYTES = 400 << 20
ROWS = (1, 2, 4, 8, 16, 64)
ERROR_ROWS = 64

Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of the expert that all kernels compute."""

    gate_up: Tensor  # [2F, D]
    down: Tensor  # [D, F]

    @property
    def module(self) -> ExpertModule:
        return ExpertModule(*self.down.shape, "silu")

    def plain(self, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


@dataclass(frozen=True, slots=True)
class Kernel:
    """`copy` lays the weights out anew; it returns what computes with that copy, and the bytes of it."""

    name: str
    dtype: torch.dtype
    copy: Callable[[Weights], tuple[Compute, int]]


@dataclass(frozen=True, slots=True)
class Speed:
    """One kernel: median milliseconds by number of rows, bytes of an expert's weights, relative error."""

    name: str
    milliseconds: tuple[float, ...]
    expert_bytes: int
    error: float


def main(
    threads: Annotated[int, typer.Option(min=1, max=256)] = 2,
    repeats: Annotated[int, typer.Option(min=3, max=200)] = 25,
    model_error: Annotated[bool, typer.Option(help="Also the error of a whole model.")] = True,
    model: options.Model = None,
    text: Annotated[
        Path | None, typer.Option(help="Text for the perplexity; absent: one that the model writes.")
    ] = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes kernels.json."""
    torch.set_num_threads(threads)
    allocator.keep_freed_memory()  # A worker does so, too.
    hidden, inner = (256, 512) if quick else (HIDDEN, INNER)
    speeds = measure_speeds(hidden, inner, 3 if quick else repeats, 0 if quick else COLD_BYTES)
    folder = model or options.DEMO_MODEL
    errors = measure_errors(folder, text.read_text() if text else None) if model_error and not quick else []
    tables = [_times(speeds), _rates(speeds)] + ([_errors(errors)] if errors else [])
    conclude(
        "kernels",
        out,
        figures=[],
        tables=tables,
        notes=[
            f"expert {hidden}x{inner}, {threads} threads, weights cold (round robin over {COLD_BYTES >> 20} MiB); "
            f"batch-invariant: tiles of {ROW_TILE} rows"
        ],
        data={"speeds": [asdict(speed) for speed in speeds], "errors": [asdict(error) for error in errors]},
        quick=quick,
    )


def measure_speeds(hidden: int, inner: int, repeats: int, cold_bytes: int) -> list[Speed]:
    generator = torch.Generator().manual_seed(0)
    weights = Weights(
        torch.randn(2 * inner, hidden, generator=generator) / hidden**0.5,
        torch.randn(hidden, inner, generator=generator) / inner**0.5,
    )
    rows = torch.randn(ERROR_ROWS, hidden, generator=generator)
    with torch.inference_mode():
        return [_measure(kernel, weights, rows, repeats, cold_bytes) for kernel in KERNELS]


def _measure(kernel: Kernel, weights: Weights, rows: Tensor, repeats: int, cold_bytes: int) -> Speed:
    first, expert_bytes = kernel.copy(weights)
    copies = [first, *(kernel.copy(weights)[0] for _ in range(cold_bytes // expert_bytes))]
    expected = weights.plain(rows)
    error = (first(rows.to(kernel.dtype)).float() - expected).norm() / expected.norm()
    times = tuple(_median_ms(copies, rows[:count].to(kernel.dtype), repeats) for count in ROWS)
    return Speed(kernel.name, times, expert_bytes, float(error))


def _median_ms(copies: list[Compute], rows: Tensor, repeats: int) -> float:
    seconds = []
    # In its first calls, which are not counted, a kernel prepares for a new number of rows.
    for turn in range(repeats + 2):
        compute = copies[turn % len(copies)]
        start = time.perf_counter()
        compute(rows)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])


def _plain(dtype: torch.dtype) -> Callable[[Weights], tuple[Compute, int]]:
    def copy(weights: Weights) -> tuple[Compute, int]:
        mine = Weights(weights.gate_up.to(dtype, copy=True), weights.down.to(dtype, copy=True))
        return mine.plain, mine.gate_up.nbytes + mine.down.nbytes

    return copy


def _grouped(dtype: torch.dtype) -> Callable[[Weights], tuple[Compute, int]]:
    """The grouped kernel with one group, which CUDA uses, here on the CPU."""

    def copy(weights: Weights) -> tuple[Compute, int]:
        form = ExpertForm(torch.device("cpu"), dtype)
        stack = empty_weights(weights.module, form, 1)
        stack.up[0] = weights.gate_up
        stack.down[0] = weights.down
        expert = make_expert(stack[0], weights.module, form, StackRow(stack, 0))
        return lambda rows: compute_experts([expert], rows, [len(rows)]), expert.num_bytes

    return copy


def _product(form: ExpertForm) -> Callable[[Weights], tuple[Compute, int]]:
    """The expert as a worker computes it."""

    def copy(weights: Weights) -> tuple[Compute, int]:
        # The weights are copied because an expert may keep those that it is made from.
        gate_up, down = (weight.to(form.dtype, copy=True) for weight in (weights.gate_up, weights.down))
        expert = make_expert(ExpertWeights(gate_up, down), weights.module, form)
        return expert, expert.num_bytes

    return copy


def _shared_scale(weights: Weights) -> tuple[Compute, int]:
    """torch's dynamic quantisation: one scale for all rows of a call."""

    def pack(weight: Tensor) -> torch.ScriptObject:
        scales, zeros = weight.abs().amax(1).double() / 127, torch.zeros(len(weight), dtype=torch.int64)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantised, None)

    gate_up, down = pack(weights.gate_up), pack(weights.down)

    def compute(rows: Tensor) -> Tensor:
        gate, up = torch.ops.quantized.linear_dynamic(rows, gate_up, False).chunk(2, dim=-1)
        return torch.ops.quantized.linear_dynamic(F.silu(gate).mul_(up), down, False)

    return compute, weights.gate_up.numel() + weights.down.numel()


def _weights_alone(weights: Weights) -> tuple[Compute, int]:
    """torch's product of 8-bit weights and bfloat16 rows."""

    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = weight.abs().amax(1) / 127
        return (weight / scales[:, None]).round().to(torch.int8), scales.bfloat16()

    gate_up, down = quantise(weights.gate_up), quantise(weights.down)

    def compute(rows: Tensor) -> Tensor:
        gate, up = torch._weight_int8pack_mm(rows, *gate_up).chunk(2, dim=-1)
        return torch._weight_int8pack_mm(F.silu(gate).mul_(up), *down)

    return compute, weights.gate_up.numel() + weights.down.numel()


CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
KERNELS = (
    Kernel("F.linear fp32", FP32, _plain(FP32)),
    Kernel("F.linear bf16", BF16, _plain(BF16)),
    Kernel("grouped_mm fp32", FP32, _grouped(FP32)),
    Kernel("grouped_mm bf16", BF16, _grouped(BF16)),
    Kernel("fp32 *", FP32, _product(ExpertForm(CPU, FP32))),
    Kernel("bf16 *", BF16, _product(ExpertForm(CPU, BF16))),
    Kernel("int8, a scale a row *", FP32, _product(ExpertForm(CPU, FP32, "int8"))),
    Kernel("int8, a scale a call", FP32, _shared_scale),
    Kernel("int8, weights alone", BF16, _weights_alone),
    Kernel("int4, weights alone *", BF16, _product(ExpertForm(CPU, FP32, "int4"))),
    Kernel("fp32, batch-invariant *", FP32, _product(ExpertForm(CPU, FP32, batch_invariant=True))),
    Kernel("bf16, batch-invariant *", BF16, _product(ExpertForm(CPU, BF16, batch_invariant=True))),
    Kernel("int8, batch-invariant *", FP32, _product(ExpertForm(CPU, FP32, "int8", batch_invariant=True))),
    Kernel("int4, batch-invariant *", BF16, _product(ExpertForm(CPU, FP32, "int4", batch_invariant=True))),
)


def _times(speeds: list[Speed]) -> Table:
    return Table(
        "Milliseconds an expert, by rows (* what a worker runs)",
        ("kernel", *map(str, ROWS), "MiB", "relative error"),
        tuple(
            (
                speed.name,
                *(f"{ms:.2f}" for ms in speed.milliseconds),
                f"{speed.expert_bytes / 2**20:.1f}",
                f"{speed.error:.2g}",
            )
            for speed in speeds
        ),
    )


def _rates(speeds: list[Speed]) -> Table:
    return Table(
        "GB of weights read a second, by rows",
        ("kernel", *map(str, ROWS)),
        tuple(
            (speed.name, *(f"{speed.expert_bytes / ms / 1e6:.1f}" for ms in speed.milliseconds))
            for speed in speeds
        ),
    )


def _errors(errors: list[Error]) -> Table:
    return Table(
        "A whole model, by the form of its experts",
        (
            *("stored", "held", "MiB each in the file", "in memory", "logit error max", "mean"),
            *("KL, nats", "same choice %", "perplexity"),
        ),
        tuple(
            (
                error.stored,
                error.held,
                f"{error.stored_mib:.2f}",
                f"{error.expert_mib:.2f}" if error.expert_mib else "",
                f"{error.logit_max:.2g}",
                f"{error.logit_mean:.2g}",
                f"{error.divergence:.2g}",
                f"{100 * error.same_choice:.1f}",
                f"{error.perplexity:.3f}",
            )
            for error in errors
        ),
    )


if __name__ == "__main__":
    typer.run(main)
