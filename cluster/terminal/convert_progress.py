"""Progress of a conversion on stderr: a bar on a terminal, elsewhere one line per file."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@dataclass(frozen=True, slots=True)
class Progressed:
    """The bytes and files that a conversion has written, and their totals."""

    done_bytes: int
    total_bytes: int
    done_files: int
    total_files: int


class ConvertProgress:
    """A context. `show` may be called after every tensor."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("converting"),
            BarColumn(bar_width=20),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._shown_files = -1

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, progress: Progressed) -> None:
        self._bar.update(self._task, total=progress.total_bytes, completed=progress.done_bytes)
        if not self._console.is_terminal and progress.done_files != self._shown_files:
            self._shown_files = progress.done_files
            self._console.print(
                f"converting: {progress.done_files} of {progress.total_files} files", highlight=False
            )
