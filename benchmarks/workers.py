"""What several workers on one host cost a user: the demo's answer with one worker and with four, in turn.

Run: python benchmarks/workers.py [--rounds 5]
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import typer
from demo_run import run_demo
from harness import options
from harness.result import Table, conclude, ratio_figure
from harness.turns import Rules, Side, Turns, take_turns

ONE, FOUR = "one worker", "four workers"


def main(
    rounds: options.Rounds = 5, out: options.Out = options.RESULTS, quick: options.Quick = False
) -> None:
    """Measures, prints, and writes workers.json."""
    # Ray's daemons count as other programs, so the machine is never quiet here, and no round is taken again.
    rules = Rules(rounds=1 if quick else rounds, retries=0, settle_s=0.0 if quick else 5.0)
    turns = take_turns(
        (
            Side(ONE, partial(run_demo, "--workers", "1")),
            Side(FOUR, partial(run_demo, "--workers", "4")),
        ),
        rules,
        "workers",
    )
    ratio = ratio_figure("demo-workers", "one worker over four", turns, ONE, FOUR, speed)
    conclude(
        "workers",
        out,
        figures=[replace(ratio, disturbed=0)],
        tables=[
            Table(
                "",
                ("", ONE, FOUR),
                (
                    ("tokens per second", *(f"{turns.median(side, speed):.0f}" for side in (ONE, FOUR))),
                    *(_phase_row(turns, phase) for phase in turns.rounds[0][ONE]["phases_s"]),
                ),
            )
        ],
        notes=["phases in ms a token, all layers"],
        quick=quick,
    )


def speed(report: dict[str, Any]) -> float:
    return float(report["answer"]["tokens_per_s"])


def _phase_row(turns: Turns[dict[str, Any]], phase: str) -> tuple[str, ...]:
    def per_token_ms(report: dict[str, Any]) -> float:
        return 1000 * float(report["phases_s"][phase]) / int(report["answer"]["num_tokens"])

    return (phase, *(f"{turns.median(side, per_token_ms):.2f}" for side in (ONE, FOUR)))


if __name__ == "__main__":
    typer.run(main)
