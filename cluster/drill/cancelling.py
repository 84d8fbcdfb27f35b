"""Clients that go away at random moments: when their work stops, and whether it leaves anything behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from cluster.bench.workload import LoadRequest
from cluster.drill.answers import Answer, Tally
from cluster.drill.report import Cancels
from cluster.drill.rig import Rig, sleep_until
from cluster.drill.schedule import Cancel, draw_cancels
from cluster.drill.timeline import Spread
from moesaic.errors import Unavailable

# In a minute or more; a shorter drill has as much less.
CANCELS = 1000
LONGEST_S = 0.6
# Longer than any client stays.
ANSWER_TOKENS = 1500
IDLE_TIMEOUT_S = 10.0


async def run_cancels(rig: Rig) -> Cancels:
    """Cancels in rounds of as many clients as there are streams. Raises Unavailable if the cluster never rests."""
    rounds = max(1, round(CANCELS * min(1.0, rig.plan.seconds / 60) / rig.plan.streams))
    requests = [replace(request, output_tokens=ANSWER_TOKENS) for request in rig.requests]
    rig.say(f"cancel: {rounds * rig.plan.streams} clients, {rig.plan.streams} at a time")
    blocks = (await _wait_idle(rig))[1]
    stops_s = [
        await _round(rig, requests, cancels)
        for cancels in draw_cancels(rounds, rig.plan.streams, rig.plan.seed, LONGEST_S)
    ]
    left = (await _wait_idle(rig))[1]
    answers = [
        Answer(prompt, await rig.api.send(request, rig.clock()))
        for prompt, request in enumerate(rig.requests)
    ]
    return Cancels(
        cancels=rounds * rig.plan.streams,
        stop=Spread.of(stops_s),
        leaked_blocks=max(0, left - blocks),
        tally=Tally.of(answers, rig.references),
    )


async def _round(rig: Rig, requests: Sequence[LoadRequest], cancels: Sequence[Cancel]) -> float:
    """Seconds from the moment at which all clients left until no router had anything to do."""
    start_s = rig.clock()

    async def client(request: LoadRequest, cancel: Cancel) -> None:
        await sleep_until(start_s + cancel.start_s, rig.clock)
        await rig.api.send(request, rig.clock())

    tasks = [
        asyncio.create_task(client(requests[index % len(requests)], cancel))
        for index, cancel in enumerate(cancels)
    ]
    await sleep_until(start_s + cancels[0].leave_s, rig.clock)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    left_s = rig.clock()
    return (await _wait_idle(rig))[0] - left_s


async def _wait_idle(rig: Rig) -> tuple[float, int]:
    """When no router had a sequence any more, and how many KV blocks were in use then."""
    deadline_s = rig.clock() + IDLE_TIMEOUT_S
    while rig.clock() < deadline_s:
        routers = (await rig.cluster.observer.observe_routers()).routers.values()
        if not any(stats.running_sequences or stats.waiting_sequences for stats in routers):
            return rig.clock(), sum(stats.kv_blocks_used for stats in routers)
    raise Unavailable(f"the routers still work {IDLE_TIMEOUT_S:.0f} s after their clients have left")
