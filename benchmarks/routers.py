"""Several routers behind one gateway: the same closed loop of requests over 1, 2 and 4 of them, in turn.

All sides share one worker with all threads. Every side has its own gateway and routers; the routers of one
side share the cores. Prompts are random, so that no prefix is shared; answers are greedy and of fixed length,
and are streamed over HTTP as `moesaic bench` asks for them.

Run: python benchmarks/routers.py [--routers 1,2,4] [--streams 16,32] [--rounds 5]
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import typer
from harness import options
from harness.load import random_requests
from harness.result import Figure, Table, conclude, ratio_figure
from harness.serving import Served, Setup, serve
from harness.turns import Side, take_turns

from cluster.bench.latency import LoadSummary
from cluster.bench.load import ask_model_name, closed_loop, completions_api
from cluster.bench.workload import LoadRequest

PROMPT_TOKENS = (8, 32)
ANSWER_TOKENS = (8, 24)
REQUESTS_PER_STREAM = 2
# Room for all streams of a side on one router; the default would reserve more than several routers can have.
KV_CACHE_MIB = "128"


def main(
    routers: Annotated[
        str, typer.Option(help="Numbers of routers, comma-separated; the first is the reference.")
    ] = ("1,2,4"),
    streams: Annotated[str, typer.Option(help="Open requests, comma-separated.")] = "16,32",
    running: Annotated[
        int,
        typer.Option(min=1, help="Sequences that a router runs at once, as if its KV memory held no more."),
    ] = 64,
    router_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of every router; absent: the cores shared out.")
    ] = None,
    expert_dtype: Annotated[str, typer.Option(help="Kind of expert weights.")] = "fp32",
    rounds: options.Rounds = 5,
    model: options.Model = None,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes routers.json."""
    folder = options.checkpoint(model, quick)
    vocabulary = options.read_shape(folder).vocabulary
    numbers = [int(number) for number in routers.split(",")]
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    with ExitStack() as stack:
        sites: dict[int, Served] = {}
        workers: tuple[str, ...] = ()
        for number in numbers:
            setup = _setup(folder, number, router_threads, running, expert_dtype, workers)
            sites[number] = stack.enter_context(serve(setup))
            workers = workers or sites[number].workers
        for count in map(int, streams.split(",")):
            number = count * (1 if quick else REQUESTS_PER_STREAM)
            requests = random_requests(number, PROMPT_TOKENS, ANSWER_TOKENS, vocabulary, seed=number)
            sides = [
                Side(str(number), partial(_measure, site, requests, count), _own_pids(site))
                for number, site in sites.items()
            ]
            turns = take_turns(sides, options.rules(rounds, quick), f"{count} streams")
            first, *others = (side.name for side in sides)
            for other in others:
                name = f"{other} routers over {first}, {count} streams"
                figures.append(ratio_figure(f"routers-{other}-s{count}", name, turns, other, first, _speed))
            rows.append((str(count), *(f"{turns.median(side.name, _speed):.1f}" for side in sides)))
    header = ("streams", *(f"{number} router{'s' if number > 1 else ''}" for number in numbers))
    conclude(
        "routers",
        out,
        figures=figures,
        tables=[Table("", header, tuple(rows))],
        notes=[
            f"tokens per second through the gateway, {expert_dtype} experts, one worker shared by all, "
            f"at most {running} running sequences a router"
        ],
        quick=quick,
    )


def _setup(
    folder: Path,
    routers: int,
    router_threads: int | None,
    running: int,
    expert_dtype: str,
    workers: tuple[str, ...],
) -> Setup:
    cores = len(psutil.Process().cpu_affinity())
    return Setup(
        folder,
        routers=routers,
        shared_workers=workers,
        gateway=True,
        settings={
            "engine.threads": str(router_threads or max(1, cores // routers)),
            "engine.max_running_sequences": str(running),
            "engine.kv_cache_mib": KV_CACHE_MIB,
            # Every round sends the same prompts.
            "engine.prefix_cache": "false",
            "worker.expert_dtype": expert_dtype,
        },
    )


def _own_pids(site: Served) -> tuple[int, ...]:
    """All but the worker, which works for every side."""
    return tuple(pid for name, pid in site.processes.items() if not name.startswith("worker"))


def _measure(site: Served, requests: Sequence[LoadRequest], open_streams: int) -> LoadSummary:
    return asyncio.run(_run(f"http://{site.http}", requests, open_streams))


async def _run(url: str, requests: Sequence[LoadRequest], open_streams: int) -> LoadSummary:
    async with completions_api(url, await ask_model_name(url)) as api:
        load = LoadSummary.of(await closed_loop(api.send, requests, open_streams))
    if load.failed_requests:
        raise SystemExit(f"requests failed: {load.errors}")
    return load


def _speed(load: LoadSummary) -> float:
    return load.output_tokens_per_s


if __name__ == "__main__":
    typer.run(main)
