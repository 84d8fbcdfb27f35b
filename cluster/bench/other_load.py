"""How much CPU time other programs use while something is measured.

A figure that is measured beside another busy process is worth little: the other process slows two OpenMP
threads down by far more than the share of the CPU that it takes. `moesaic bench` looks at the machine once, before it starts; the
programs in `benchmarks/` watch every measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

SAMPLE_S = 1.0
# An idle system uses less than this share of its CPU time by itself.
QUIET_SHARE = 0.05
# A measurement counts as disturbed when other processes use more cores than this.
QUIET_CORES = 0.10
_LOOK_S = 0.3
# `user` already includes guest time. Stolen time went to another guest of the hypervisor. Waiting for disks
# is idle.
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
_IDLE = ("idle", "iowait")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Seconds of CPU time so far: of the whole machine, and of this process with all its descendants."""

    at_s: float
    busy_s: float
    ours_s: float


@dataclass(frozen=True, slots=True)
class Watched:
    """The cores that a measurement lost to other programs, and to processes of ours that should be idle."""

    seconds: float
    others_cores: float
    idle_cores: float

    @property
    def quiet(self) -> bool:
        return self.others_cores <= QUIET_CORES and self.idle_cores <= QUIET_CORES


async def share_used_by_others(seconds: float = SAMPLE_S) -> float:
    """The share of this machine's CPU time that is used while nothing of ours is running."""
    before = psutil.cpu_times()
    await asyncio.sleep(seconds)
    return busy_share(before, psutil.cpu_times())


def busy_share(before: Any, after: Any) -> float:
    """The busy share of all CPU time between two readings of psutil.cpu_times()."""
    busy_s = _sum(after, _BUSY) - _sum(before, _BUSY)
    total_s = busy_s + _sum(after, _IDLE) - _sum(before, _IDLE)
    return busy_s / total_s if total_s > 0 else 0.0


def read_cpu() -> CpuReading:
    return CpuReading(time.monotonic(), _sum(psutil.cpu_times(), _BUSY), _own_cpu_s())


def cpu_of(pids: Iterable[int]) -> float:
    """Seconds of CPU time of these processes; a process that has ended counts as zero."""
    total_s = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total_s += times.user + times.system
    return total_s


def others_cores(before: CpuReading, after: CpuReading) -> float:
    """The cores that were neither idle nor used by us between two readings."""
    elapsed_s = max(after.at_s - before.at_s, 1e-9)
    return max(0.0, (after.busy_s - before.busy_s) - (after.ours_s - before.ours_s)) / elapsed_s


def watch(measure: Callable[[], _T], idle_pids: Iterable[int] = ()) -> tuple[_T, Watched]:
    """Runs `measure`; `idle_pids` are processes of ours that should be idle meanwhile."""
    pids = tuple(idle_pids)
    before, idle_before_s = read_cpu(), cpu_of(pids)
    result = measure()
    after, idle_after_s = read_cpu(), cpu_of(pids)
    elapsed_s = max(after.at_s - before.at_s, 1e-9)
    return result, Watched(
        elapsed_s, others_cores(before, after), max(0.0, idle_after_s - idle_before_s) / elapsed_s
    )


def wait_until_quiet(timeout_s: float) -> bool:
    """Samples the machine until it is quiet; False when `timeout_s` passes first."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        before = read_cpu()
        time.sleep(_LOOK_S)
        if others_cores(before, read_cpu()) <= QUIET_CORES:
            return True
        if time.monotonic() >= deadline_s:
            return False


def _own_cpu_s() -> float:
    root = psutil.Process()
    total_s = 0.0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # Children that have already been waited for were ours, too.
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def _sum(times: Any, names: Iterable[str]) -> float:
    """Not every system has all of these counters."""
    return float(sum(getattr(times, name, 0.0) for name in names))
