"""The gain of batching: output tokens per second with many open streams, over one request after another.

Prompts have 32 to 512 tokens and answers 16 to 128, all drawn from a seed. The serial side would take minutes
a round, so each round runs another part of the requests one after another, and all of them together; over all
rounds the serial side has served exactly the same requests once. The prefix cache is off, so that no
repetition profits from it.

Run: python benchmarks/goodput.py [--streams 64] [--rounds 5]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import count
from typing import Annotated

import typer
from harness import options
from harness.load import quantile, random_requests, run_load
from harness.result import Figure, Table, conclude
from harness.serving import Setup, serve
from harness.turns import Side, take_turns

from cluster.bench.latency import LoadSummary, RequestRecord
from cluster.bench.workload import LoadRequest

TOGETHER, SERIAL = "together", "one by one"
SETTINGS = options.ON_GRPC | {"engine.prefix_cache": "false", "engine.kv_cache_mib": "1024"}


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

        def serially() -> list[RequestRecord]:
            return run_load(site.router, requests[next(part) % rules.rounds :: rules.rounds], 1)

        def together() -> list[RequestRecord]:
            return run_load(site.router, requests, len(requests))

        turns = take_turns((Side(SERIAL, serially), Side(TOGETHER, together)), rules, "goodput")
    records = {name: [round_[name] for round_ in turns.rounds] for name in (TOGETHER, SERIAL)}
    together_, serial = ([LoadSummary.of(each) for each in records[name]] for name in (TOGETHER, SERIAL))
    pairs = [
        mine.output_tokens_per_s / other.output_tokens_per_s
        for mine, other in zip(together_, serial, strict=True)
    ]
    rate = statistics.median(load.output_tokens_per_s for load in together_)
    serial_rate = sum(load.output_tokens for load in serial) / sum(load.seconds for load in serial)
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
                (_row(TOGETHER, rate, records[TOGETHER]), _row(SERIAL, serial_rate, records[SERIAL])),
            )
        ],
        quick=quick,
    )


def make_requests(number: int, vocabulary: int) -> list[LoadRequest]:
    """Ordered by cost, so that every n-th one is a fair part of all."""
    requests = random_requests(number, (32, 512), (16, 128), vocabulary, seed=64)
    return sorted(requests, key=lambda request: request.output_tokens + len(request.prompt) / 16)


def _row(name: str, rate: float, rounds: Sequence[Sequence[RequestRecord]]) -> tuple[str, ...]:
    waits_s = [record.token_times_s[0] - record.due_s for records in rounds for record in records]
    return (name, f"{rate:.1f}", f"{statistics.median(waits_s):.2f}", f"{quantile(waits_s, 0.99):.2f}")


if __name__ == "__main__":
    typer.run(main)
