"""What several workers on one host cost: the demo's answer with one worker and with four, in turn.

Run: python benchmarks/workers.py [--pairs 5]
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import typer
from demo_run import run_demo


def main(pairs: Annotated[int, typer.Option(min=1, max=20)] = 5) -> None:
    """Prints medians and the ratio pair by pair."""
    runs = [(run_demo("--workers", "1"), run_demo("--workers", "4")) for _ in range(pairs)]
    one, four = ([speed(report) for report in side] for side in zip(*runs, strict=True))
    ratios = [a / b for a, b in zip(one, four, strict=True)]
    print(f"{pairs} pairs, tokens per second: one worker {median(one)}, four workers {median(four)}")
    print(f"one over four, pair by pair: {median(ratios, 2)} ({min(ratios):.2f} to {max(ratios):.2f})")
    print("| phase, ms a token | one worker | four workers |")
    print("| --- | ---: | ---: |")
    for phase in runs[0][0]["phases_s"]:
        cells = [
            median([per_token_ms(report, phase) for report in side], 2) for side in zip(*runs, strict=True)
        ]
        print(f"| {phase} | {cells[0]} | {cells[1]} |")


def speed(report: dict[str, Any]) -> float:
    return float(report["answer"]["tokens_per_s"])


def per_token_ms(report: dict[str, Any], phase: str) -> float:
    return 1000 * float(report["phases_s"][phase]) / int(report["answer"]["num_tokens"])


def median(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f}"


if __name__ == "__main__":
    typer.run(main)
