"""Whether the machine was ours alone: the CPU that others used while something was measured.

A figure taken beside another busy process is worth little, and a second one hurts two OpenMP threads far more than its
share. So every measurement is watched, and says how many cores went elsewhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import psutil

# Cores that others may use before a measurement counts as disturbed.
QUIET_CORES = 0.10
_LOOK_S = 0.3

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Seconds of CPU so far: of the whole machine, and of this process with all its descendants."""

    at_s: float
    busy_s: float
    ours_s: float


@dataclass(frozen=True, slots=True)
class Watched:
    """What went elsewhere during a measurement, in cores: to strangers, and to our own processes that should be idle."""

    seconds: float
    others_cores: float
    idle_cores: float

    @property
    def quiet(self) -> bool:
        return self.others_cores <= QUIET_CORES and self.idle_cores <= QUIET_CORES


def read_cpu() -> CpuReading:
    machine = psutil.cpu_times()
    # `user` holds guest time already; time stolen by the hypervisor was somebody else's.
    busy_s = sum(
        getattr(machine, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")
    )
    return CpuReading(time.monotonic(), busy_s, _own_cpu_s())


def cpu_of(pids: Iterable[int]) -> float:
    """Seconds of CPU of these processes; one that is gone counts nothing."""
    total_s = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total_s += times.user + times.system
    return total_s


def others_cores(before: CpuReading, after: CpuReading) -> float:
    """Cores that neither idled nor worked for us between two readings."""
    elapsed_s = max(after.at_s - before.at_s, 1e-9)
    return max(0.0, (after.busy_s - before.busy_s) - (after.ours_s - before.ours_s)) / elapsed_s


def watch(measure: Callable[[], _T], idle_pids: Iterable[int] = ()) -> tuple[_T, Watched]:
    """Runs `measure`; `idle_pids` are processes of ours that ought to do nothing meanwhile."""
    pids = tuple(idle_pids)
    before, idle_before_s = read_cpu(), cpu_of(pids)
    result = measure()
    after, idle_after_s = read_cpu(), cpu_of(pids)
    elapsed_s = max(after.at_s - before.at_s, 1e-9)
    return result, Watched(
        elapsed_s, others_cores(before, after), max(0.0, idle_after_s - idle_before_s) / elapsed_s
    )


def wait_until_quiet(timeout_s: float) -> bool:
    """Looks in short spells until one is quiet; False when `timeout_s` passed first."""
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
            # Of children that were waited for, too: they were ours.
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s
