"""The progress of a benchmark on stderr: a bar on a terminal, elsewhere one line for each run."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from cluster.bench.latency import RequestRecord
from cluster.bench.load import Send
from cluster.bench.workload import LoadRequest

# The bar is redrawn rarely, because the load generator shares its cores with what it measures.
REFRESH_PER_S = 2


class BenchProgress:
    """A context manager that shows one bar at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("requests"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def counted(self, label: str, total: int, send: Send) -> Send:
        """Wraps `send`, so that every answer advances the bar of `label`."""
        if not self._console.is_terminal:
            self._console.print(f"{label}: {total} requests")
        if self._task is not None:
            self._bar.remove_task(self._task)
        task = self._task = self._bar.add_task(label, total=total)

        async def send_and_count(request: LoadRequest, due_s: float) -> RequestRecord:
            record = await send(request, due_s)
            self._bar.advance(task)
            return record

        return send_and_count
