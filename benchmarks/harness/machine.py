"""The machine and the versions behind a figure."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a reader needs to place a figure."""

    cpu: str
    cores: int
    memory_gib: float
    # Instruction sets that decide which kernels are fast.
    features: str
    python: str
    system: str
    versions: Mapping[str, str]

    @property
    def text(self) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cores} cores ({self.cpu}; {self.features}), {self.memory_gib:.0f} GiB, {self.system}; "
            f"Python {self.python}, {packages}"
        )


def describe_machine() -> Machine:
    info = _cpu_info()
    flags = set(info.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return Machine(
        cpu=info.get("model name", platform.processor() or platform.machine()),
        cores=len(psutil.Process().cpu_affinity()),
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        features=" ".join(flag for flag in wanted if flag in flags) or "no AVX",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release().split('-')[0]}",
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )


def _cpu_info() -> dict[str, str]:
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    return dict(re.findall(r"^([^\t:]+)\s*: (.*)$", file.read_text().split("\n\n")[0], re.MULTILINE))
