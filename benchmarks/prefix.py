"""What the prefix cache saves: time to the first token of prompts that have their first 256 tokens in common.

Two sites with the same weights, one with the cache and one without, are asked in turn; every prompt ends with
32 tokens of its own. The shared part has been read once before anything counts.

Run: python benchmarks/prefix.py [--shared 256] [--tail 32] [--rounds 5]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from harness import options
from harness.load import Prompt, first_token, random_prompts, settle
from harness.result import Table, conclude, ratio_figure
from harness.serving import Setup, serve
from harness.turns import Side, take_turns

WITH, WITHOUT = "with", "without"
# A measurement is the median of this many prompts.
PROMPTS = 8


def main(
    shared: Annotated[int, typer.Option(min=1, help="Tokens in common.")] = 256,
    tail: Annotated[int, typer.Option(min=1, help="Tokens of each prompt alone.")] = 32,
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes prefix.json."""
    folder = options.checkpoint(model, quick)
    vocabulary = options.read_shape(folder).vocabulary
    (prefix,) = random_prompts(1, shared, vocabulary, seed=256)
    tails = iter(random_prompts(5000, tail, vocabulary, seed=257))
    with serve(_setup(folder, True)) as cached, serve(_setup(folder, False)) as plain:
        for site in (cached, plain):
            first_token(site.router, prefix + next(tails))
        turns = take_turns(
            (
                Side(WITH, partial(_first_token, cached.router, prefix, tails), cached.pids),
                Side(WITHOUT, partial(_first_token, plain.router, prefix, tails), plain.pids),
            ),
            options.rules(rounds, quick),
            "prefix",
        )
        hits = settle(cached.router)
    looked_up = max(1, hits.prefix_lookup_tokens)
    title = f"time to first token, {shared} tokens shared, with the prefix cache over without"
    conclude(
        "prefix",
        out,
        figures=[ratio_figure(f"prefix-{shared}", title, turns, WITH, WITHOUT, float)],
        tables=[
            Table(
                "",
                ("prompt", "with ms", "without ms", "of looked-up tokens found"),
                (
                    (
                        f"{shared} shared + {tail}",
                        *(f"{1000 * turns.median(side, float):.0f}" for side in (WITH, WITHOUT)),
                        f"{hits.prefix_hit_tokens / looked_up:.0%}",
                    ),
                ),
            )
        ],
        quick=quick,
    )


def _setup(folder: Path, cache: bool) -> Setup:
    return Setup(folder, settings=options.ON_GRPC | {"engine.prefix_cache": str(cache).lower()})


def _first_token(router: str, prefix: Prompt, tails: Iterator[Prompt]) -> float:
    return statistics.median(first_token(router, prefix + next(tails)).seconds for _ in range(PROMPTS))


if __name__ == "__main__":
    typer.run(main)
