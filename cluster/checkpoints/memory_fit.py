"""Whether a model's weights fit into a machine's memory, in each form in which they can be held. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.checkpoints.model_facts import HELD, Held, held_bytes
from moesaic.families import MoeModel
from moesaic.settings import Settings

# fits: there is room now. tight: only if other programs give memory back. no: never, on this machine.
Fit = Literal["fits", "tight", "no"]

_FLAGS: Mapping[Held, str] = {
    "fp32": "--dtype fp32",
    "bf16": "--dtype bf16",
    "int8": "--expert-dtype int8",
    "int4": "--expert-dtype int4",
}
_GB, _MB = 1_000_000_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Memory:
    """A machine's memory: what it can give at all, swap included, and what is free now."""

    limit: int
    available: int

    def fit(self, num_bytes: int) -> Fit:
        if num_bytes > self.limit:
            return "no"
        return "fits" if num_bytes <= self.available else "tight"


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """The bytes of all weights by the form of the experts, whether each fits on this machine, and both in a sentence."""

    bytes: dict[Held, int]
    fits: dict[Held, Fit]
    machine: Memory
    sentence: str


def fit_model(model: MoeModel, settings: Settings, memory: Memory) -> MemoryFit:
    needed = needs(model, settings)
    return MemoryFit(
        needed,
        {held: memory.fit(num_bytes) for held, num_bytes in needed.items()},
        memory,
        explain(needed, chosen_form(settings), memory),
    )


def needs(model: MoeModel, settings: Settings) -> dict[Held, int]:
    """The bytes of all weights by the form of the experts, without a form that the model cannot have. The rest is in bf16
    beside experts in bf16 or where the settings say so, else in fp32, the default of CPUs."""
    rest_in_bf16 = settings.dtype == "bfloat16"
    num_bytes: dict[Held, int] = {}
    for held in HELD:
        experts = held_bytes(model, held)
        if experts is not None:
            item_bytes = 2 if held == "bf16" or (rest_in_bf16 and held != "fp32") else 4
            rest = model.num_dense_parameters * item_bytes
            num_bytes[held] = settings.cluster.replicas * experts + settings.cluster.routers * rest
    return num_bytes


def chosen_form(settings: Settings) -> Held:
    """The form in which a CPU holds the experts by these settings."""
    if settings.worker.expert_dtype != "auto":
        return settings.worker.expert_dtype
    return "bf16" if settings.dtype == "bfloat16" else "fp32"


def explain(needed: Mapping[Held, int], chosen: Held, memory: Memory) -> str:
    """What is needed, what there is, and what to do: `needs 187 GB in fp32 (93 bf16, 47 int8), this machine has 24 GB: …`."""
    if chosen not in needed:
        return f"experts of these sizes cannot be held in {chosen}"
    fit = memory.fit(needed[chosen])
    unit, name = (_GB, "GB") if max(needed.values()) >= _GB else (_MB, "MB")
    others = ", ".join(f"{_in(unit, needed[held])} {held}" for held in needed if held != chosen)
    text = f"needs {_in(unit, needed[chosen])} {name} in {chosen} ({others})"
    text += f", this machine has {_in(_GB, memory.limit)} GB"
    if fit != "no":
        text += f", {_in(_GB, memory.available)} GB of it free"
    if fit == "fits":
        return text
    smaller = [
        held for held in needed if needed[held] < needed[chosen] and memory.fit(needed[held]) == "fits"
    ]
    return f"{text}: " + ", or ".join([*(_FLAGS[held] for held in smaller[:1]), "--workers on more nodes"])


def _in(unit: int, num_bytes: int) -> str:
    value = num_bytes / unit
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
