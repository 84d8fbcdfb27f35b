"""Progress of work in stages on stderr: a bar for each on a terminal, elsewhere a line for each that ends."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# The shortest detail, and what stands beside it.
_LEAST_CHARS = 24
_OTHER_CHARS = 46


class StageProgress:
    """A context. A stage ends when another one begins, or when the context does without an error."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._stage: str | None = None
        self._task = TaskID(0)
        self._detail = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end()
        self._bars.stop()

    def show(self, stage: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        """How much of a stage is done; a `total` of 0 where nobody knows."""
        if stage != self._stage:
            self._end()
            self._stage = stage
            self._task = self._bars.add_task(stage, total=None, detail="")
        self._detail = detail
        self._bars.update(self._task, completed=done, total=total or None, detail=self._fitting(detail))

    def _end(self) -> None:
        if self._stage is None:
            return
        # A bar that is full, whether or not its total was ever known.
        self._bars.update(self._task, completed=1, total=1)
        self._bars.stop_task(self._task)
        if not self._console.is_terminal:
            line = f"{self._stage}: {self._detail}" if self._detail else self._stage
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._stage = None

    def _fitting(self, detail: str) -> str:
        """What the terminal has room for beside name, bar and time."""
        room = max(_LEAST_CHARS, self._console.width - _OTHER_CHARS)
        return detail if len(detail) <= room else f"{detail[: room - 1]}…"
