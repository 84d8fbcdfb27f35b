"""What batching wins: output tokens per second with many open streams, over the same requests one after another.

Prompts of 32 to 512 and answers of 16 to 128 tokens, seeded. The serial side would take minutes a round, so each round runs
another part of the requests one after another and all of them together; over all rounds the serial side has served
exactly the same requests once. The prefix cache is off, so that no repetition profits.

Run: python benchmarks/goodput.py [--streams 64] [--rounds 5]
"""

from __future__ import annotations

import random
import statistics
from itertools import count
from typing import Annotated

import typer
from harness import options
from harness.result import Figure, Table, conclude
from harness.serving import Setup, serve
from harness.turns import Side, take_turns
from harness.workload import Load, Request, quantile, random_prompts, run_load

TOGETHER, SERIAL = "together", "one by one"
SETTINGS = {"engine.prefix_cache": "false", "engine.kv_cache_mib": "1024", "engine.shared_memory": "off"}


def main(
    streams: Annotated[int, typer.Option(min=1, help="Open streams, and requests.")] = 64,
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes goodput.json."""
    folder = options.checkpoint(model, quick)
    rules = options.rules(rounds, quick)
    requests = make_requests(8 if quick else streams, options.read_shape(folder).vocabulary)
    part = count()
    with serve(Setup(folder, settings=SETTINGS)) as site:
        run_load(site.router, requests[:2], 1)

        def serially() -> Load:
            return run_load(site.router, requests[next(part) % rules.rounds :: rules.rounds], 1)

        def together() -> Load:
            return run_load(site.router, requests, len(requests))

        turns = take_turns((Side(SERIAL, serially), Side(TOGETHER, together)), rules, "goodput")
    pairs = [round_[TOGETHER].tokens_per_s / round_[SERIAL].tokens_per_s for round_ in turns.rounds]
    serial_rate = sum(round_[SERIAL].tokens for round_ in turns.rounds) / sum(
        round_[SERIAL].seconds for round_ in turns.rounds
    )
    rate = turns.median(TOGETHER, lambda load: load.tokens_per_s)
    conclude(
        "goodput",
        out,
        figures=[
            Figure(
                f"goodput-{streams}",
                f"goodput with {len(requests)} open streams over one after another",
                rate / serial_rate,
                "x",
                min(pairs),
                max(pairs),
                sum(turns.disturbed),
            )
        ],
        tables=[
            Table(
                "",
                ("requests", "output tokens/s", "first token p50 s", "first token p99 s"),
                tuple(
                    _row(name, speed, [round_[name] for round_ in turns.rounds])
                    for name, speed in ((TOGETHER, rate), (SERIAL, serial_rate))
                ),
            )
        ],
        quick=quick,
    )


def make_requests(number: int, vocabulary: int) -> list[Request]:
    """Ordered by cost, so that every n-th one is a fair part of all."""
    draw = random.Random(64)
    requests = [
        Request(random_prompts(1, draw.randint(32, 512), vocabulary, seed=index)[0], draw.randint(16, 128))
        for index in range(number)
    ]
    return sorted(requests, key=lambda request: request.max_tokens + len(request.prompt) / 16)


def _row(name: str, rate: float, loads: list[Load]) -> tuple[str, ...]:
    waits = [stream.first_token_s for load in loads for stream in load.streams]
    return (name, f"{rate:.1f}", f"{statistics.median(waits):.2f}", f"{quantile(waits, 0.99):.2f}")


if __name__ == "__main__":
    typer.run(main)
