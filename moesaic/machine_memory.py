"""The memory of this machine, as far as this process may use it. Needs psutil, which a client does not install."""

from __future__ import annotations

from pathlib import Path

import psutil

# The group of this process in a container, and of a machine without groups. v2, then v1.
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_CGROUP = Path("/sys/fs/cgroup")


def read_memory(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """The bytes that this machine can give at all, swap included, and those that are free now; both within the limit of
    the control group, if there is one."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit, available = memory.total + swap.total, memory.available
    for limit_file, usage_file in _LIMITS:
        most, used = _read(cgroup / limit_file), _read(cgroup / usage_file)
        if most is not None:
            limit = min(limit, most)
            used = (used or 0) - _cached((cgroup / limit_file).parent)
            available = min(available, max(0, most - max(0, used)))
    return limit, available


def _cached(group: Path) -> int:
    """The bytes of a group that are copies of files, which it gives up when it needs them."""
    try:
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def _read(file: Path) -> int | None:
    """The number in a file; None without one, or for the word `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
