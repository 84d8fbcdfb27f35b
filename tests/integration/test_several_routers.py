"""Two real routers and a gateway over one real worker: shared load, one answer, and the death of a router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support.processes import Process, running_gateway, running_router, running_workers

import cluster
from moesaic import Client
from moesaic.v1 import inference_pb2

DEMO_MODEL = Path(cluster.__file__).parent / "demo_model"
PROMPTS = [f"Act {index}. Enter {'the king and ' * (index % 5)}CLOWN:" for index in range(12)]
SHARED = "Enter the whole court, one after another, and speak in turn. " * 8


@dataclass(frozen=True, slots=True)
class Deployment:
    routers: list[Process]
    gateway: Process

    async def stats(self, index: int) -> inference_pb2.GetRouterStatsResponse:
        async with Client(self.routers[index].address) as client:
            return await client.router_stats()

    async def alone(self, prompt: str) -> str:
        """What a router answers without the gateway."""
        async with Client(self.routers[-1].address) as client:
            return (await client.complete(prompt, max_tokens=16, temperature=0)).text


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    with (
        running_workers(DEMO_MODEL, ["all"]) as workers,
        running_router(DEMO_MODEL, workers) as first,
        running_router(DEMO_MODEL, workers) as second,
        running_gateway(first, "--router", second.address) as gateway,
    ):
        with httpx.Client(base_url=f"http://{gateway.address}", timeout=60) as http:
            deadline = time.monotonic() + 60.0
            while http.get("/ready").status_code != 200:
                assert time.monotonic() < deadline, gateway.log
                time.sleep(0.05)
        yield Deployment([first, second], gateway)


async def complete(http: httpx.AsyncClient, prompt: str) -> str:
    body = {"model": "demo_model", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


async def test_both_routers_work_prefixes_stay_together_and_one_may_die(deployment: Deployment) -> None:
    async with httpx.AsyncClient(base_url=f"http://{deployment.gateway.address}", timeout=60.0) as http:
        expected = [await deployment.alone(prompt) for prompt in PROMPTS]
        before = [(await deployment.stats(index)).prompt_tokens for index in range(2)]
        together = await asyncio.gather(*(complete(http, prompt) for prompt in PROMPTS))
        after = [(await deployment.stats(index)).prompt_tokens for index in range(2)]
        assert together == expected
        assert all(new > old for old, new in zip(before, after, strict=True))

        for index in range(4):
            await complete(http, f"{SHARED}{index}")
        last = [(await deployment.stats(index)).prompt_tokens for index in range(2)]
        assert sorted(new > old for old, new in zip(after, last, strict=True)) == [False, True]

        deployment.routers[0].kill()
        assert await asyncio.gather(*(complete(http, prompt) for prompt in PROMPTS)) == expected
        assert (await http.get("/health")).status_code == 200
