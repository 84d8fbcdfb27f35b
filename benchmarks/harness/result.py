"""What a benchmark found: figures, tables, raw numbers, and the machine they come from.

A result is a JSON file on disk, and Markdown tables in the terminal.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from cluster.bench.machine import cpu_features, describe_machine
from harness.targets import BY_KEY
from harness.turns import Turns

_ROOT = Path(__file__).resolve().parents[2]
# The packages whose versions decide a figure.
_PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "numpy")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, judged if its `key` is in targets.py; `low` and `high` are the range over the rounds."""

    key: str
    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    # The number of rounds that were kept although the machine was not quiet.
    disturbed: int = 0

    @property
    def verdict(self) -> str:
        target = BY_KEY.get(self.key)
        return "reported" if target is None else target.verdict(self.value)

    @property
    def text(self) -> str:
        """`1.23 (1.10 to 1.31)`."""
        spread = (
            "" if self.low is None or self.high is None else f" ({_short(self.low)} to {_short(self.high)})"
        )
        unit = "" if self.unit == "x" else f" {self.unit}"
        return f"{_short(self.value)}{unit}{spread}{' †' if self.disturbed else ''}"


def ratio_figure(
    key: str, name: str, turns: Turns[_T], side: str, other: str, of: Callable[[_T], float]
) -> Figure:
    """`side` over `other`: the ratio of medians, with the range of the pairs."""
    ratio = turns.ratio(side, other, of)
    return Figure(key, name, ratio.value, "x", ratio.low, ratio.high, sum(turns.disturbed))


def median_figure(
    key: str, name: str, turns: Turns[_T], side: str, of: Callable[[_T], float], unit: str
) -> Figure:
    """The median of one side, with the range of its rounds."""
    values = turns.values(side, of)
    return Figure(key, name, turns.median(side, of), unit, min(values), max(values), sum(turns.disturbed))


@dataclass(frozen=True, slots=True)
class Table:
    """A table for people; the first column is text, the others are numbers as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def markdown(self) -> str:
        rule = ("---", *["---:"] * (len(self.header) - 1))
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.header, rule, *self.rows)]
        return "\n".join([*([self.title, ""] if self.title else []), *lines])


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one program."""

    name: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    # Raw measurements for further computation, as plain JSON values.
    data: Mapping[str, Any]
    quick: bool
    command: str
    finished: str
    # The values of `describe_host`.
    machine: Mapping[str, Any]

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}.json"
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        return file

    @classmethod
    def load(cls, file: Path) -> Self:
        raw = json.loads(file.read_text())
        return cls(
            **{
                **raw,
                "figures": tuple(Figure(**figure) for figure in raw["figures"]),
                "tables": tuple(
                    Table(table["title"], tuple(table["header"]), tuple(map(tuple, table["rows"])))
                    for table in raw["tables"]
                ),
                "notes": tuple(raw["notes"]),
            }
        )

    def show(self) -> None:
        """Prints tables, figures and notes."""
        for table in self.tables:
            print(f"{table.markdown}\n")
        for figure in self.figures:
            target = BY_KEY.get(figure.key)
            bound = (
                ""
                if target is None
                else f"; must {target.must:g}, excellent {target.excellent:g}: {figure.verdict}"
            )
            print(f"{figure.name}: {figure.text}{bound}")
        for note in self.notes:
            print(f"note: {note}")


def conclude(
    name: str,
    out: Path,
    *,
    figures: Sequence[Figure],
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> Result:
    """Builds a result, prints it and writes it to `out`/NAME.json."""
    marked = [*notes]
    if any(figure.disturbed for figure in figures):
        marked.append("† some rounds were kept although more than a tenth of a core went elsewhere.")
    result = Result(
        name,
        tuple(figures),
        tuple(tables),
        tuple(marked),
        data or {},
        quick,
        _typed(sys.argv),
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        describe_host(),
    )
    result.show()
    print(f"written to {result.save(out)}", file=sys.stderr)
    return result


def describe_host() -> dict[str, Any]:
    """The machine and the versions behind a figure, as plain JSON values."""
    machine = describe_machine()
    return {
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_gib": round(machine.memory_bytes / (1 << 30), 1),
        "features": " ".join(cpu_features()) or "no AVX",
        "python": machine.python,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "versions": {name: machine.packages[name] for name in _PACKAGES},
    }


def _typed(arguments: Sequence[str]) -> str:
    """The command as typed in the checkout, without the result's folder; of other paths only the names."""
    words = [word.removeprefix(f"{_ROOT}/") for word in arguments]
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return shlex.join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def _short(value: float) -> str:
    """About three significant digits."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 or value == 0 else f"{value:.1f}" if size >= 20 else f"{value:.2f}"
