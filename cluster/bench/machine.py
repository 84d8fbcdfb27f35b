"""The machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("moesaic", "torch", "transformers", "grpcio", "protobuf", "ray", "numpy")
# The instruction sets that decide which kernels are fast.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """What has to stand beside every figure. `cores` counts those that this process may run on."""

    cpu: str
    cores: int
    memory_bytes: int
    python: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    return Machine(
        cpu=_cpu_info().get("model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
    )


def cpu_features() -> tuple[str, ...]:
    """Those of FEATURES that the CPU has."""
    flags = set(_cpu_info().get("flags", "").split())
    return tuple(feature for feature in FEATURES if feature in flags)


def _cpu_info() -> dict[str, str]:
    """The first core's lines of /proc/cpuinfo; empty on a system without that file."""
    if not _CPU_INFO.exists():
        return {}
    first_core = _CPU_INFO.read_text().split("\n\n")[0]
    return dict(re.findall(r"^([^\t:]+)\s*: (.*)$", first_core, re.MULTILINE))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
