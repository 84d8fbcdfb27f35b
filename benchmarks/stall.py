"""How far a prompt of 512 tokens holds up eight running streams: their inter-token p99 while it is read.

Within one round the same eight streams decode undisturbed for a while, then several prompts arrive one after
another. Only gaps that end while a prompt is being read (from its arrival to its first token) count as
disturbed, so that quiet stretches between arrivals do not thin them out. The value is p99 over p99.

Run: python benchmarks/stall.py [--tokens 512] [--arrivals 4] [--rounds 5]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated

import typer
from harness import options
from harness.load import Prompt, Stream, quantile, random_prompts, send, streaming
from harness.result import Figure, Table, conclude
from harness.serving import Setup, serve
from harness.turns import Side, take_turns

from cluster.bench.workload import LoadRequest
from moesaic import Client

STREAMS = 8
QUIET_TOKENS = 40
BETWEEN_TOKENS = 4
NAME = "streams"


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between tokens: undisturbed, and while a prompt was read; and how long each prompt took."""

    quiet: tuple[float, ...]
    disturbed: tuple[float, ...]
    first_tokens_s: tuple[float, ...]

    @property
    def stall(self) -> float:
        return quantile(self.disturbed, 0.99) / quantile(self.quiet, 0.99)


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the arriving prompt.")] = 512,
    arrivals: Annotated[int, typer.Option(min=1, help="Prompts a round.")] = 4,
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes stall.json."""
    folder = options.checkpoint(model, quick)
    vocabulary = options.read_shape(folder).vocabulary
    prompts = random_prompts(STREAMS, 32, vocabulary, seed=8)
    fresh = iter(random_prompts(1000, tokens, vocabulary, seed=9))
    with serve(Setup(folder, settings=options.ON_GRPC)) as site:
        turns = take_turns(
            (Side(NAME, partial(_round, site.router, prompts, fresh, 1 if quick else arrivals)),),
            options.rules(rounds, quick),
            "stall",
        )
    rounds_ = [round_[NAME] for round_ in turns.rounds]
    quiet = turns.median(NAME, lambda gaps: quantile(gaps.quiet, 0.99))
    disturbed = turns.median(NAME, lambda gaps: quantile(gaps.disturbed, 0.99))
    conclude(
        "stall",
        out,
        figures=[
            Figure(
                f"stall-{tokens}",
                f"inter-token p99 of {STREAMS} streams while a prompt of {tokens} is read, over quiet",
                disturbed / quiet,
                "x",
                min(gaps.stall for gaps in rounds_),
                max(gaps.stall for gaps in rounds_),
                sum(turns.disturbed),
            )
        ],
        tables=[
            Table(
                "",
                ("gaps between tokens", "p50 ms", "p99 ms", "longest ms", "number"),
                (
                    _row("undisturbed", [gap for gaps in rounds_ for gap in gaps.quiet]),
                    _row(
                        f"while {tokens} tokens are read", [gap for gaps in rounds_ for gap in gaps.disturbed]
                    ),
                    _row(
                        "the prompt's own first token", [s for gaps in rounds_ for s in gaps.first_tokens_s]
                    ),
                ),
            )
        ],
        quick=quick,
    )


def _row(name: str, seconds: Sequence[float]) -> tuple[str, ...]:
    values = (quantile(seconds, 0.5), quantile(seconds, 0.99), max(seconds))
    return (name, *(f"{1000 * value:.0f}" for value in values), str(len(seconds)))


def _round(router: str, prompts: Sequence[Prompt], fresh: Iterator[Prompt], arrivals: int) -> Gaps:
    return asyncio.run(_observe(router, prompts, fresh, arrivals))


async def _observe(router: str, prompts: Sequence[Prompt], fresh: Iterator[Prompt], arrivals: int) -> Gaps:
    readings: list[tuple[float, float]] = []
    async with Client(router, retries=False) as client:
        await client.model_info()
        async with streaming(client, prompts, 2048) as streams:
            await streams.write(2)
            quiet_from_s = max(stream.token_times_s[-1] for stream in streams.all)
            await streams.write(QUIET_TOKENS)
            quiet_to_s = min(stream.token_times_s[-1] for stream in streams.all)
            for _ in range(arrivals):
                reading = await send(client, LoadRequest(next(fresh), 1), time.perf_counter())
                readings.append((reading.due_s, reading.token_times_s[0]))
                await streams.write(BETWEEN_TOKENS)
    return Gaps(
        tuple(gaps_ending_within(streams.all, quiet_from_s, quiet_to_s)),
        tuple(gap for start, end in readings for gap in gaps_ending_within(streams.all, start, end)),
        tuple(end - start for start, end in readings),
    )


def gaps_ending_within(streams: Sequence[Stream], start_s: float, end_s: float) -> list[float]:
    return [
        later - earlier
        for stream in streams
        for earlier, later in pairwise(stream.token_times_s)
        if start_s <= later <= end_s
    ]


if __name__ == "__main__":
    typer.run(main)
