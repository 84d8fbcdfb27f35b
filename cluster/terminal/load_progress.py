"""Progress of a starting cluster on stderr: one line per process, with a bar for each that reads weights.

On a terminal the lines are redrawn in place. Elsewhere every change of state is printed as one plain line.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from moesaic.v1 import control_pb2

RAY = "Ray"
_DONE = (control_pb2.PROCESS_STATE_READY, control_pb2.PROCESS_STATE_FAILED)


class LoadProgress:
    """A context. `show` may be called with every new topology."""

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
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start_ray(self) -> None:
        """Shows that Ray starts, which takes seconds, and on a busy machine many."""
        self._tasks[RAY] = self._bars.add_task(RAY, total=None, state="starting")
        if not self._console.is_terminal:
            self._console.print(f"{RAY}: starting", highlight=False)

    def end_ray(self) -> None:
        self._bars.remove_task(self._tasks.pop(RAY))

    def announce(self, line: str) -> None:
        """Prints a line; on a terminal it stands above what is redrawn."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, topology: control_pb2.GetTopologyResponse) -> None:
        for process in topology.processes:
            state = control_pb2.ProcessState.Name(process.state).removeprefix("PROCESS_STATE_").lower()
            self._draw(process, state)
            self._say(process, state)

    def _say(self, process: control_pb2.Process, state: str) -> None:
        """A line for every state where there are no bars, and everywhere for what a process waits for."""
        line = f"{process.name}: {_words(process, state)}"
        if self._shown.get(process.name) != line:
            self._shown[process.name] = line
            if process.detail or not self._console.is_terminal:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)

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


def _words(process: control_pb2.Process, state: str) -> str:
    """What a process does, for a person. One that waits does nothing else, and says what it waits for."""
    if process.detail and process.state == control_pb2.PROCESS_STATE_PENDING:
        return process.detail
    return f"{state}: {process.detail}" if process.detail else state


class _Bytes(DownloadColumn):
    """Loaded and total bytes; empty for a process without weights."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.total <= 1:
            return Text("")
        return super().render(task)
