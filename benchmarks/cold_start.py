"""From the command to the first token: `moesaic demo` on the built-in model, several times, with its own breakdown.

Run: python benchmarks/cold_start.py [--runs 5]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def main(runs: Annotated[int, typer.Option(min=1, max=20)] = 5) -> None:
    """Prints a table of medians."""
    reports = [run_demo() for _ in range(runs)]
    print(f"{runs} runs of `moesaic demo --max-tokens 1`, seconds: median (min to max)")
    print("| from the start of the command to | s |")
    print("| --- | ---: |")
    for milestone in reports[0]:
        values = [report[milestone] for report in reports]
        print(f"| {milestone} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |")


def run_demo() -> dict[str, float]:
    command = [str(Path(sys.executable).with_name("moesaic")), "demo", "--max-tokens", "1", "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    milestones: dict[str, float] = json.loads(printed)["milestones_s"]
    return milestones


if __name__ == "__main__":
    typer.run(main)
