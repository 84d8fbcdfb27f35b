"""The machine that a figure was measured on, and whether anything else kept it busy."""

from __future__ import annotations

import asyncio
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 1.0
# Below it is what any running system does by itself.
QUIET_SHARE = 0.05
PACKAGES = ("moesaic", "torch", "transformers", "grpcio", "protobuf", "ray", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """What has to stand beside every figure. `cores`: that this process may run on."""

    cpu: str
    cores: int
    memory_bytes: int
    python: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
    )


async def share_used_by_others(seconds: float = SAMPLE_S) -> float:
    """The share of this machine's CPU time that is taken while nothing of ours is running."""
    before = psutil.cpu_times()
    await asyncio.sleep(seconds)
    return busy_share(before, psutil.cpu_times())


def busy_share(before: Any, after: Any) -> float:
    """Of all CPU time between two readings of psutil.cpu_times(); waiting for disks is idle."""
    spent = {
        name: getattr(after, name) - getattr(before, name)
        for name in ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    }
    total = sum(spent.values())
    return 1.0 - (spent["idle"] + spent["iowait"]) / total if total > 0 else 0.0


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
