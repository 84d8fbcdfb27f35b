"""The state of a process at one moment, as its host reports it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.v1 import control_pb2

# Reasons of an Unavailable that are evidence: the process is gone, it says itself that it does not serve, or it
# cannot be started where it was placed. Any other Unavailable is mere silence.
PROCESS_DIED = "PROCESS_DIED"
NOT_SERVING = "NOT_SERVING"
CANNOT_START = "CANNOT_START"
EVIDENCE = frozenset({PROCESS_DIED, NOT_SERVING, CANNOT_START})


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """The state of one process.

    `revision` grows with every change but progress, `contents_revision` with every change of the experts that
    a READY worker holds. Both start anew with the process.
    """

    name: str
    revision: int
    state: control_pb2.ProcessState
    address: str
    node: str
    pid: int
    restarts: int
    loaded_bytes: int = 0
    total_bytes: int = 0
    detail: str = ""
    contents_revision: int = 0

    @property
    def ready(self) -> bool:
        return self.state == control_pb2.PROCESS_STATE_READY
