"""Takes CPU time away from a process: a quota of the kernel where control groups can be made, else stops and starts.

Both give the process the same share of a core for each of its periods; the quota does it without signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.drill.signals import go_on, stop

# Of one core.
SLOW_SHARE = 0.1
PERIOD_S = 0.1
_CGROUPS = Path("/sys/fs/cgroup")
_PERIOD_US = int(PERIOD_S * 1e6)
_QUOTA_US = int(SLOW_SHARE * _PERIOD_US)
# How often a group is left before it may be removed: a process takes a moment to move.
_REMOVALS, _REMOVAL_PERIOD_S = 50, 0.02


@dataclass(frozen=True, slots=True)
class CpuGroups:
    """Where groups with a quota can be made, and what is written into their files to set it."""

    folder: Path
    settings: tuple[tuple[str, str], ...]


def find_cpu_groups(root: Path = _CGROUPS) -> CpuGroups | None:
    """Version 2 where its CPU controller is on, else version 1; None where this process may make no group."""
    controllers = root / "cgroup.subtree_control"
    if controllers.exists() and "cpu" in controllers.read_text().split():
        groups = CpuGroups(root, (("cpu.max", f"{_QUOTA_US} {_PERIOD_US}"),))
    elif (root / "cpu" / "cgroup.procs").exists():
        settings = (("cpu.cfs_period_us", str(_PERIOD_US)), ("cpu.cfs_quota_us", str(_QUOTA_US)))
        groups = CpuGroups(root / "cpu", settings)
    else:
        return None
    return groups if os.access(groups.folder, os.W_OK) else None


@contextlib.asynccontextmanager
async def slowed(pids: Sequence[int], groups: CpuGroups | None) -> AsyncIterator[None]:
    """Each process has SLOW_SHARE of a core until the context ends."""
    if groups is not None:
        with contextlib.ExitStack() as stack:
            for pid in pids:
                stack.enter_context(_in_group(pid, groups))
            yield
        return
    cycle = asyncio.create_task(_stop_and_go(pids))
    try:
        yield
    finally:
        cycle.cancel()
        await asyncio.gather(cycle, return_exceptions=True)
        go_on(pids)


@contextlib.contextmanager
def _in_group(pid: int, groups: CpuGroups) -> Iterator[None]:
    before = groups.folder / _group_of(pid, groups).lstrip("/")
    group = groups.folder / f"moesaic-drill-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        for file, value in groups.settings:
            (group / file).write_text(value)
        _move(pid, group)
        yield
    finally:
        _move(pid, before)
        _remove(group)


def _group_of(pid: int, groups: CpuGroups) -> str:
    """The path of a process's group below the hierarchy's root, as /proc says it: `4:cpu:/a/b`, `0::/a/b` for v2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (groups.folder == _CGROUPS and not controllers) or "cpu" in controllers.split(","):
            return path
    return "/"


def _move(pid: int, group: Path) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        (group / "cgroup.procs").write_text(str(pid))


def _remove(group: Path) -> None:
    """Waits for the kernel, which counts a process that just left or ended as a member for a moment."""
    for attempt in range(_REMOVALS):
        try:
            group.rmdir()
            return
        except OSError:
            if attempt == _REMOVALS - 1:
                raise
            time.sleep(_REMOVAL_PERIOD_S)


async def _stop_and_go(pids: Sequence[int]) -> None:
    while True:
        stop(pids)
        await asyncio.sleep((1 - SLOW_SHARE) * PERIOD_S)
        go_on(pids)
        await asyncio.sleep(SLOW_SHARE * PERIOD_S)
