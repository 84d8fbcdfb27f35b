"""Writes the figures of the last run into the marked blocks of docs/performance.md, and keeps the prose.

A block begins with `<!-- bench:NAME -->` and ends with `<!-- /bench:NAME -->`. NAME is a result (whose block
has the tables, figures and notes of NAME.json), `speed` (the rates of decode.json and what follows from them),
`judged` (every target with its figure and verdict) or `machine`. A figure stands in one place: in the judged
table, in a table of its result, or in the list below those.

Run: python benchmarks/report.py [--results benchmarks/results] [--document docs/performance.md] [--to FILE]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from harness import options
from harness.result import Figure, Result, Table
from harness.speed_summary import summarise
from harness.targets import BY_KEY, TARGETS, Target

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench:(?P=name) -->)", re.DOTALL)


def main(
    results: Annotated[Path, typer.Option(help="Folder of the results' JSON.")] = options.RESULTS,
    document: Annotated[Path, typer.Option(help="Where the blocks are.")] = DOCUMENT,
    to: Annotated[Path | None, typer.Option(help="Where to write; absent: the document itself.")] = None,
) -> None:
    """Renders all blocks."""
    found = {file.stem: Result.load(file) for file in sorted(results.glob("*.json"))}
    if not found:
        raise SystemExit(f"{results} holds no results")
    target = to or document
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(document.read_text(), found))
    print(f"written to {target}")


def render(text: str, results: Mapping[str, Result]) -> str:
    """`text` with its blocks filled; a block without a result keeps its content."""

    def fill(match: re.Match[str]) -> str:
        content = _block(match["name"], results)
        return match[0] if content is None else f"{match[1]}{content}\n{match[3]}"

    return BLOCK.sub(fill, text)


def _block(name: str, results: Mapping[str, Result]) -> str | None:
    if name == "judged":
        return judged_table(results.values()).markdown
    if name == "machine":
        return "\n".join(dict.fromkeys(_machine(result) for result in results.values()))
    if name == "speed":
        return summarise(results["decode"]) if "decode" in results else None
    return render_result(results[name]) if name in results else None


def judged_table(results: Iterable[Result]) -> Table:
    """Every target, including those that were not measured."""
    figures = {figure.key: figure for result in results for figure in result.figures}
    return Table(
        "",
        ("comparison", "measured", "must", "excellent", "verdict"),
        tuple(_judged(target, figures.get(target.key)) for target in TARGETS),
    )


def _judged(target: Target, figure: Figure | None) -> tuple[str, ...]:
    sign = "≥" if target.better == "higher" else "≤"
    unit = "" if target.unit == "x" else f" {target.unit}"
    bounds = (f"{sign} {bound:g}{unit}" for bound in (target.must, target.excellent))
    measured, verdict = ("", "not measured") if figure is None else (figure.text, figure.verdict)
    return (target.comparison, measured, *bounds, f"**{verdict}**" if verdict == "missed" else verdict)


def render_result(result: Result) -> str:
    """The tables, then figures and notes, then the command and its date."""
    parts = [table.markdown for table in result.tables]
    if listed := [
        f"- {figure.name}: {figure.text}" for figure in result.figures if _is_listed(figure, result)
    ]:
        parts.append("\n".join(listed))
    if result.notes:
        parts.append("\n".join(f"- {note}" for note in result.notes))
    parts.append(f"`{result.command}`, {result.finished}")
    return "\n\n".join(parts)


def _is_listed(figure: Figure, result: Result) -> bool:
    """Whether neither the judged table nor a table of the result has this figure.

    A text without a range is no proof that the cell means the figure.
    """
    cells = {cell for table in result.tables for row in table.rows for cell in row}
    return figure.key not in BY_KEY and not (figure.low is not None and figure.text in cells)


def _machine(result: Result) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in result.machine["versions"].items())
    return (
        "{cores} cores ({cpu}; {features}), {memory_gib:.0f} GiB, {system}; Python {python}, {packages}."
    ).format(**result.machine, packages=packages)


if __name__ == "__main__":
    typer.run(main)
