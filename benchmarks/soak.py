"""Leaks: the growth of every process over 2,000 requests, and the KV blocks still in use at the end.

The demo model runs behind a router, a worker and a gateway, with 16 requests at a time: one half over HTTP,
one half over gRPC, and every tenth caller cancels in the middle. The KV cache is small enough to be full
after the warm-up.

Run: python benchmarks/soak.py [--requests 2000]
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Annotated

import httpx
import psutil
import typer
from harness import options
from harness.load import until_idle
from harness.result import Figure, Table, conclude
from harness.serving import Served, Setup, serve
from harness.turns import progress

from moesaic import Client

OPEN_REQUESTS = 16
LEAVES_EARLY = 10
MEGABYTE = 1_000_000
# The warm-up fills this cache: its pages become resident when they are first written, which must not count as
# growth.
SETTINGS = {"engine.kv_cache_mib": "32"}
WORDS = ("the", "king", "import", "people", "return", "night", "value", "of", "and", "self", "love", "state")


def main(
    requests: Annotated[int, typer.Option(min=10, help="Requests after the warm-up.")] = 2000,
    warm_up: Annotated[int, typer.Option(min=1, help="Requests before the first look.")] = 500,
    out: options.Out = options.RESULTS,
    quick: options.Quick = False,
) -> None:
    """Measures, prints, and writes soak.json."""
    if quick:
        requests, warm_up = 60, 20
    with serve(Setup(options.DEMO_MODEL, settings=SETTINGS, gateway=True)) as site:
        asyncio.run(_serve_requests(site, range(warm_up)))
        before = _resident(site)
        progress(f"soak: {requests} requests after a warm-up of {warm_up}")
        leaked_blocks = asyncio.run(_serve_requests(site, range(warm_up, warm_up + requests)))
        after = _resident(site)
    growth = {name: (after[name] - before[name]) / MEGABYTE for name in before}
    conclude(
        "soak",
        out,
        figures=[
            Figure(
                "rss-growth",
                f"growth of the process that grew most, {requests} requests",
                max(growth.values()),
                "MB",
            ),
            Figure("kv-leak", "KV blocks in use at the end", leaked_blocks, "blocks"),
        ],
        tables=[
            Table(
                "",
                ("process", "before MB", "after MB", "growth MB"),
                tuple(
                    (
                        name,
                        f"{before[name] / MEGABYTE:,.1f}",
                        f"{after[name] / MEGABYTE:,.1f}",
                        f"{growth[name]:+.1f}",
                    )
                    for name in before
                ),
            )
        ],
        quick=quick,
    )


def _resident(site: Served) -> Mapping[str, int]:
    return {name: psutil.Process(pid).memory_info().rss for name, pid in site.processes.items()}


async def _serve_requests(site: Served, numbers: range) -> int:
    """Sends the requests, and returns the KV blocks in use after the last one has ended."""
    gate = asyncio.Semaphore(OPEN_REQUESTS)
    async with (
        Client(site.router, retries=False) as client,
        httpx.AsyncClient(base_url=f"http://{site.http}") as http,
    ):

        async def one(number: int) -> None:
            async with gate:
                prompt, max_tokens = _request(number)
                if number % LEAVES_EARLY == 0:
                    await _leave_early(client, prompt, max_tokens)
                elif number % 2:
                    await client.complete(prompt, max_tokens=max_tokens)
                else:
                    body = {"model": "demo_model", "prompt": prompt, "max_tokens": max_tokens}
                    answer = await http.post("/v1/completions", json=body, timeout=60.0)
                    answer.raise_for_status()

        await asyncio.gather(*map(one, numbers))
        stats = await until_idle(client)
        return int(stats.kv_blocks_used)


async def _leave_early(client: Client, prompt: str, max_tokens: int) -> None:
    tokens = client.generate(prompt, max_tokens=max_tokens)
    await anext(tokens)
    await tokens.aclose()


def _request(number: int) -> tuple[str, int]:
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 48))), draw.randint(4, 24)


if __name__ == "__main__":
    typer.run(main)
