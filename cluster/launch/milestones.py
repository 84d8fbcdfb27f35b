"""The milestones of a start, in seconds since the process began: the interpreter's own start counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from moesaic.v1 import control_pb2

_EXPERT_WORKER = control_pb2.PROCESS_ROLE_EXPERT_WORKER


def seconds_since_start() -> float:
    """The age of this process."""
    # Field 22 of stat(5), counted after the name in parentheses: ticks from boot to the start of the process.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Milestones:
    """The milestones reached so far, in order."""

    def __init__(self, clock: Callable[[], float] = seconds_since_start) -> None:
        self._clock = clock
        self.reached_s: dict[str, float] = {}

    def reach(self, name: str) -> None:
        """Notes the time, unless the milestone was reached before."""
        self.reached_s.setdefault(name, self._clock())

    def look(self, topology: control_pb2.GetTopologyResponse) -> None:
        """Notes the milestones that the topology shows."""
        if not topology.processes:
            return
        self.reach("controller answers")
        if all(process.pid for process in topology.processes):
            self.reach("all processes run")
        workers = [process for process in topology.processes if process.role == _EXPERT_WORKER]
        if workers and all(worker.state == control_pb2.PROCESS_STATE_READY for worker in workers):
            self.reach("experts loaded")
