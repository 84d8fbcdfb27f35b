"""The time from the command to the first token of `moesaic demo`, over several runs, with its milestones.

Run: python benchmarks/cold_start.py [--rounds 5]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import typer
from demo_run import run_demo
from harness import options
from harness.result import Figure, Table, conclude
from harness.turns import progress


def main(
    rounds: options.Rounds = 5, out: options.Out = options.RESULTS, quick: options.Quick = False
) -> None:
    """Measures, prints, and writes cold_start.json."""
    reports: list[Mapping[str, float]] = []
    for number in range(1 if quick else rounds):
        reports.append(run_demo("--max-tokens", "1")["milestones_s"])
        progress(f"cold start: {number + 1} of {rounds}")
    last = list(reports[0])[-1]
    seconds = [report[last] for report in reports]
    conclude(
        "cold_start",
        out,
        figures=[
            Figure(
                "cold-start",
                "from the command to the first token",
                statistics.median(seconds),
                "s",
                min(seconds),
                max(seconds),
            )
        ],
        tables=[
            Table(
                "",
                ("from the start of the command to", "s"),
                tuple((name, _spread([report[name] for report in reports])) for name in reports[0]),
            )
        ],
        quick=quick,
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    typer.run(main)
