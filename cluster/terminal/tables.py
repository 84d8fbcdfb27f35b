"""Tables that fit the width of the terminal, and sizes and states as text."""

from __future__ import annotations

import math
from collections.abc import Collection
from copy import copy
from dataclasses import replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from moesaic.v1 import control_pb2

_COLOURS = {
    control_pb2.PROCESS_STATE_READY: "green",
    control_pb2.PROCESS_STATE_FAILED: "red",
    control_pb2.PROCESS_STATE_STOPPED: "dim",
}
_BAR_WIDTH = 20
# The padding of a cell. With the box's own space, columns are two characters apart.
_PADDING = (0, 1, 0, 0)
_ANY_WIDTH = 10_000


class FittingTable(Table):
    """A table that leaves out whole columns where the terminal is narrow, and never cuts what it shows."""

    # Headers of the columns that may be left out, the least important first.
    droppable: Collection[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from Table.__rich_console__(self._fitting(console, options), console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Table.__rich_measure__(self._fitting(console, options), console, options)

    def _fitting(self, console: Console, options: ConsoleOptions) -> FittingTable:
        table, wide = self, options.update_width(_ANY_WIDTH)
        for header in self.droppable:
            if Table.__rich_measure__(table, console, wide).maximum <= options.max_width:
                break
            table = table._without(header)
        return table

    def _without(self, header: str) -> FittingTable:
        table = copy(self)
        kept = (column for column in self.columns if column.header != header)
        table.columns = [replace(column, _index=index) for index, column in enumerate(kept)]
        return table


def new_table(*columns: str, drop: Collection[str] = ()) -> FittingTable:
    """A table without side lines. A column whose name begins with > is right-aligned.

    `drop`: columns that a narrow terminal does not show, the least important first.
    """
    table = FittingTable(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=_PADDING
    )
    table.droppable = drop
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True
        )
    return table


def state_text(state: control_pb2.ProcessState) -> str:
    name = control_pb2.ProcessState.Name(state).removeprefix("PROCESS_STATE_").lower()
    return f"[{_COLOURS.get(state, 'yellow')}]{name}[/]"


def count(number: int) -> str:
    """12345 -> 12,345."""
    return f"{number:,}"


def files(number: int) -> str:
    """1 -> 1 file, 2 -> 2 files."""
    return "1 file" if number == 1 else f"{count(number)} files"


def amount(number: int) -> str:
    """46702792704 -> 46.7 B: three digits, in thousands, millions or billions."""
    value, unit = float(number), ""
    for larger in ("K", "M", "B"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if not unit:
        return str(number)
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"


def size(num_bytes: int) -> str:
    """A number of bytes in the unit that leaves one to four digits."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def bar(share: float) -> str:
    """A share, from 0 to 1, as a bar."""
    return "█" * round(share * _BAR_WIDTH)
