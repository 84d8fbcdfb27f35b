"""What the processes of a cluster hold: memory, descriptors, threads, shared memory. It must not grow with faults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Residue:
    """The sums over all processes of a cluster. `shared_bytes` are part of `resident_bytes`."""

    processes: int
    resident_bytes: int
    shared_bytes: int
    descriptors: int
    threads: int

    def growth(self, before: Residue) -> dict[str, float]:
        """By name, how many times as much there is as before."""
        return {
            name: now / then if then else 1.0
            for (name, now), then in zip(asdict(self).items(), asdict(before).values(), strict=True)
        }


def measure(pids: Iterable[int]) -> Residue:
    """A process that ends meanwhile is left out."""
    counted = [residue for pid in pids if (residue := _of(pid)) is not None]
    return Residue(
        *(sum(values) for values in zip(*(asdict(each).values() for each in counted), strict=True))
    )


def _of(pid: int) -> Residue | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        with process.oneshot():
            memory = process.memory_info()
            return Residue(1, memory.rss, memory.shared, process.num_fds(), process.num_threads())
    return None
