"""A program that loads a cluster as a drill does, while its caller does something to a host; for a host of its own.

`python host_load_program.py http://HOST:PORT HOST:PORT SECONDS WORKER,WORKER`: after a healthy control of so many seconds it prints
`now`. Then its caller writes a line for each thing that it has done to the host of these workers, `cut` or `healed`, and `end` after
the last. The program prints one line of JSON with what was lost, wrong and mixed, the pauses of the control, of the cuts and of the
times after them, how long the workers were without calls after each cut, and their share of the calls in the control.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from cluster.drill.answers import Tally
from cluster.drill.load import Load
from cluster.drill.rig import PROMPTS_OF_EPOCHS, DrillPlan, Rig, rig_of
from cluster.drill.site import running_site
from cluster.drill.timeline import Span, Spread, longest_pauses_s, pauses_within_s, rate_within

STREAMS = 8
WARM_UP_S = 3.0
# How soon after a cut everything has to be as before.
NORMAL_AFTER_S = 0.5
LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Cut:
    """When it began and ended, and how long its workers had no calls after that; None for a host that does not come back."""

    start_s: float
    healed_s: float | None = None
    unused_s: float | None = None


async def main(url: str, grpc: str, seconds: float, workers: Collection[str]) -> None:
    plan = DrillPlan(seconds, seed=1, streams=STREAMS)
    async with (
        running_site(url, grpc) as site,
        rig_of(site, plan, lambda line: None, num_prompts=PROMPTS_OF_EPOCHS) as rig,
    ):
        load = Load(rig.api.send, rig.requests, plan.streams, rig.clock)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await asyncio.sleep(WARM_UP_S)
            before, start_s = await _calls(rig), rig.clock()
            await asyncio.sleep(seconds)
            control = Span(start_s, rig.clock())
            calls = await _calls(rig) - before
            print("now", flush=True)
            cuts = await _follow(rig, workers)
            end_s = rig.clock()
            load.stop()
        share = sum(calls[worker] for worker in workers) / calls.total()
        print(json.dumps({**_figures(load, rig, control, cuts, end_s), "share": share}), flush=True)


async def _follow(rig: Rig, workers: Collection[str]) -> list[Cut]:
    """What the caller did, until it has ended."""
    cuts: list[Cut] = []
    while (word := (await asyncio.to_thread(sys.stdin.readline)).strip()) in ("cut", "healed"):
        now_s = rig.clock()
        if word == "cut":
            cuts.append(Cut(now_s))
        else:
            cuts[-1] = Cut(cuts[-1].start_s, now_s, await _unused_s(rig, workers))
    assert word == "end"
    return cuts


async def _unused_s(rig: Rig, workers: Collection[str]) -> float:
    """Seconds from now until each of the workers gets calls again."""
    start_s, before = rig.clock(), await _calls(rig)
    waiting = set(workers)
    while waiting:
        await asyncio.sleep(LOOK_S)
        calls = await _calls(rig)
        # A worker that was started again is counted anew.
        waiting = {worker for worker in waiting if calls[worker] in (0, before[worker])}
    return rig.clock() - start_s


async def _calls(rig: Rig) -> Counter[str]:
    calls: Counter[str] = Counter()
    for stats in (await rig.cluster.observer.observe_routers()).routers.values():
        for traffic in stats.workers:
            calls[traffic.worker] += traffic.calls
    return calls


def _figures(load: Load, rig: Rig, control: Span, cuts: list[Cut], end_s: float) -> dict[str, object]:
    """Times are seconds; `gap_p99_s` is that of all gaps between tokens, `pause_s` the longest one."""
    tally = Tally.of(load.answers, rig.references)
    records = [answer.record for answer in load.answers]
    figures: dict[str, object] = {
        "requests": tally.requests,
        "lost": tally.lost,
        "wrong_tokens": tally.wrong_tokens,
        "mixed": tally.mixed,
        "errors": tally.errors,
        "unused_s": [cut.unused_s for cut in cuts],
    }
    starts_s = [cut.start_s for cut in cuts[1:]] + [end_s]
    normal_s = [end_s if cut.healed_s is None else cut.healed_s + NORMAL_AFTER_S for cut in cuts]
    cut_off = [Span(cut.start_s, till_s) for cut, till_s in zip(cuts, normal_s, strict=True)]
    after = [Span(*span) for span in zip(normal_s, starts_s, strict=True) if span[0] < span[1]]
    for name, spans in (("control", [control]), ("cut", cut_off), ("after", after)):
        figures[name] = {
            "pause_s": max(longest_pauses_s(records, spans), default=None),
            "gap_p99_s": Spread.of(pauses_within_s(records, spans)).p99_s,
            "tokens_per_s": rate_within(records, spans),
        }
    return figures


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4].split(",")))
