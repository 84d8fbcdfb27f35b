"""The rates of a device: bytes and products a second, and the time of our own expert pass in its two forms.

Prints one JSON object. Run by h200.py: python benchmarks/peers/device_probe.py DEVICE HIDDEN INNER EXPERTS
TOP_K
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from harness.random_experts import fill_expert
from torch import Tensor

from expert_worker.experts.expert import (
    Expert,
    ExpertForm,
    ExpertWeights,
    StackRow,
    can_stack,
    compute_experts,
    empty_weights,
    make_expert,
)
from moesaic.families.model import ExpertModule

REPEATS = 9
WARM_UPS = 3
# More than any cache holds.
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
TOKENS = (1, 4, 16, 64, 2048)


def _median_s(device: torch.device, work: Callable[[], object]) -> float:
    seconds = []
    for repeat in range(WARM_UPS + REPEATS):
        start_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= WARM_UPS:
            seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def read_rate(device: torch.device) -> float:
    """Bytes a second: the better of a copy, which moves each byte twice, and a sum."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _median_s(device, lambda: target.copy_(source))
    return max(copied, source.nbytes / _median_s(device, source.sum))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product of random numbers, because zeros would be faster."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _median_s(device, lambda: left @ right)


def pass_seconds(
    form: ExpertForm, module: ExpertModule, num_experts: int, top_k: int
) -> list[dict[str, float | int | None]]:
    """Seconds of one layer's experts under uniform routing: in the grouped kernel, and one after another."""
    stack = empty_weights(module, form, num_experts)
    for slot in range(num_experts):
        fill_expert(stack.up[slot], stack.down[slot], 0, slot)
    apart = _experts(stack, module, form, grouped=False)
    together = _experts(stack, module, form, grouped=True)
    found: list[dict[str, float | int | None]] = []
    for tokens in TOKENS:
        counts = _uniform_counts(tokens, num_experts, top_k)
        rows = torch.randn(sum(counts), module.hidden_size, device=form.device).to(form.dtype)
        grouped = can_stack(form, module)
        found.append({
            "tokens": tokens,
            "experts": sum(count > 0 for count in counts),
            "apart_s": _pass_s(apart, rows, counts),
            "grouped_s": _pass_s(together, rows, counts) if grouped else None,
        })  # fmt: skip
    return found


def _experts(stack: ExpertWeights, module: ExpertModule, form: ExpertForm, *, grouped: bool) -> list[Expert]:
    return [
        make_expert(stack[slot], module, form, StackRow(stack, slot) if grouped else None)
        for slot in range(len(stack.up))
    ]


def _uniform_counts(tokens: int, num_experts: int, top_k: int) -> list[int]:
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.multinomial(torch.ones(tokens, num_experts), top_k, generator=generator)
    counts: list[int] = chosen.flatten().bincount(minlength=num_experts).tolist()
    return counts


def _pass_s(experts: list[Expert], rows: Tensor, counts: list[int]) -> float:
    used = [expert for expert, count in zip(experts, counts, strict=True) if count]
    some = [count for count in counts if count]
    return _median_s(rows.device, lambda: compute_experts(used, rows, some))


@torch.inference_mode()
def _main(kind: str, hidden: int, inner: int, num_experts: int, top_k: int) -> None:
    device = torch.device(kind)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    form = ExpertForm(device, dtype)
    answer = {
        "name": torch.cuda.get_device_name(device) if kind == "cuda" else "the host's CPU",
        "bytes_per_s": read_rate(device),
        "flops_per_s": product_rate(device, dtype),
        "passes": pass_seconds(form, ExpertModule(hidden, inner, "silu"), num_experts, top_k),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:6]))
