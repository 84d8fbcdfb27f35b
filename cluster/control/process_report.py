"""A process at one moment, as its host reports it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """A process at one moment. `revision` grows with every change but progress; it starts anew with the process."""

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

    @property
    def ready(self) -> bool:
        return self.state == control_pb2.PROCESS_STATE_READY
