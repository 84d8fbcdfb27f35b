"""The two loops send what they are told, when they are told."""

from __future__ import annotations

import asyncio

from cluster.bench.latency import RequestRecord
from cluster.bench.load import closed_loop, open_loop
from cluster.bench.workload import LoadRequest

REQUESTS = [LoadRequest((number,), 1) for number in range(10)]


class Server:
    """Answers a request after a few turns of the loop."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.active = 0
        self.most_active = 0

    async def send(self, request: LoadRequest, due_s: float) -> RequestRecord:
        self.prompts.append(request.prompt)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        for _ in range(3):
            await asyncio.sleep(0)
        self.active -= 1
        return RequestRecord(due_s, due_s + 1.0, 1, (due_s + 1.0,))


async def test_a_closed_loop_keeps_its_streams_busy_and_sends_everything_once() -> None:
    server = Server()
    records = await closed_loop(server.send, REQUESTS, 4)
    assert (server.most_active, len(records)) == (4, 10)
    assert sorted(server.prompts) == [request.prompt for request in REQUESTS]


async def test_a_closed_loop_has_no_more_streams_than_requests() -> None:
    server = Server()
    assert len(await closed_loop(server.send, REQUESTS[:2], 64)) == 2
    assert server.most_active == 2


async def test_an_open_loop_waits_for_no_answer() -> None:
    server, slept_s = Server(), []

    async def sleep(seconds: float) -> None:
        slept_s.append(seconds)

    arrivals_s = [0.5 * number for number in range(10)]
    records = await open_loop(server.send, REQUESTS, arrivals_s, clock=lambda: 100.0, sleep=sleep)
    assert slept_s == arrivals_s
    assert [record.due_s for record in records] == [100.0 + arrival_s for arrival_s in arrivals_s]
    assert server.most_active == 10
