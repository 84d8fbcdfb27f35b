"""What a person sees on stderr while a folder is converted: a bar on a terminal, elsewhere a line for every file."""

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
    """How far a conversion is: of all bytes, and of all files."""

    done_bytes: int
    total_bytes: int
    done_files: int
    total_files: int


class ConvertProgress:
    """Use as a context; `show` may be called with every tensor."""

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
        self._told_files = -1

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, progress: Progressed) -> None:
        self._bar.update(self._task, total=progress.total_bytes, completed=progress.done_bytes)
        if not self._console.is_terminal and progress.done_files != self._told_files:
            self._told_files = progress.done_files
            self._console.print(
                f"converting: {progress.done_files} of {progress.total_files} files", highlight=False
            )
