"""From the command to the first token: `moesaic demo` on the built-in model, several times, with its own breakdown.

Run: python benchmarks/cold_start.py [--runs 5]
"""

from __future__ import annotations

import statistics
from typing import Annotated

import typer
from demo_run import run_demo


def main(runs: Annotated[int, typer.Option(min=1, max=20)] = 5) -> None:
    """Prints a table of medians."""
    reports = [run_demo("--max-tokens", "1")["milestones_s"] for _ in range(runs)]
    print(f"{runs} runs of `moesaic demo --max-tokens 1`, seconds: median (min to max)")
    print("| from the start of the command to | s |")
    print("| --- | ---: |")
    for milestone in reports[0]:
        values = [report[milestone] for report in reports]
        print(f"| {milestone} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |")


if __name__ == "__main__":
    typer.run(main)
