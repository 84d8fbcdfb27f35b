"""What a person sees while a cluster starts: one line per process, with a bar where weights are read.

On a terminal the lines are redrawn in place; elsewhere every change of state is one plain line. Always on stderr.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from moesaic.v1 import control_pb2

_DONE = (control_pb2.PROCESS_STATE_READY, control_pb2.PROCESS_STATE_FAILED)


class LoadProgress:
    """Use as a context; `show` may be called with every look at the cluster."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]●[/]"),
            TextColumn("{task.description:<18}"),
            TextColumn("{task.fields[state]:<8}"),
            BarColumn(bar_width=20),
            _Bytes(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, topology: control_pb2.GetTopologyResponse) -> None:
        for process in topology.processes:
            state = control_pb2.ProcessState.Name(process.state).removeprefix("PROCESS_STATE_").lower()
            self._draw(process, state)
            if not self._console.is_terminal and self._told.get(process.name) != state:
                self._told[process.name] = state
                self._console.print(f"{process.name}: {state} {process.detail}".rstrip(), highlight=False)

    def _draw(self, process: control_pb2.Process, state: str) -> None:
        if process.name not in self._tasks:
            self._tasks[process.name] = self._bars.add_task(process.name, total=None, state=state)
        done = process.state in _DONE
        self._bars.update(
            self._tasks[process.name],
            state=state,
            total=process.total_bytes or (1 if done else None),
            completed=process.loaded_bytes or (1 if done else 0),
        )


class _Bytes(DownloadColumn):
    """Loaded of total, for those that load weights."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.total <= 1:
            return Text("")
        return super().render(task)
