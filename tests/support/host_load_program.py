"""A program that loads a cluster as a drill does, while its caller does something to a host; for a host of its own.

`python host_load_program.py http://HOST:PORT HOST:PORT SECONDS`: after a healthy control of so many seconds it prints `now`, and
after as many again one line of JSON with what was lost, wrong and mixed, the pauses of both times, and the calls that each worker
got in the control.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from cluster.drill.answers import Tally
from cluster.drill.load import Load
from cluster.drill.rig import PROMPTS_OF_EPOCHS, DrillPlan, Rig, rig_of
from cluster.drill.site import running_site
from cluster.drill.timeline import Span, Spread, longest_pauses_s, pauses_within_s, rate_within

STREAMS = 8
WARM_UP_S = 3.0


async def main(url: str, grpc: str, seconds: float) -> None:
    plan = DrillPlan(seconds, seed=1, streams=STREAMS)
    async with (
        running_site(url, grpc) as site,
        rig_of(site, plan, lambda line: None, num_prompts=PROMPTS_OF_EPOCHS) as rig,
    ):
        load = Load(rig.api.send, rig.requests, plan.streams, rig.clock)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await asyncio.sleep(WARM_UP_S)
            before = await _calls(rig)
            control = await _spell(rig)
            calls = await _calls(rig) - before
            print("now", flush=True)
            disturbed = await _spell(rig)
            load.stop()
        print(json.dumps({**_figures(load, rig, control, disturbed), "calls": calls}), flush=True)


async def _spell(rig: Rig) -> Span:
    start_s = rig.clock()
    await asyncio.sleep(rig.plan.seconds)
    return Span(start_s, rig.clock())


async def _calls(rig: Rig) -> Counter[str]:
    calls: Counter[str] = Counter()
    for stats in (await rig.cluster.observer.observe_routers()).routers.values():
        for traffic in stats.workers:
            calls[traffic.worker] += traffic.calls
    return calls


def _figures(load: Load, rig: Rig, control: Span, disturbed: Span) -> dict[str, object]:
    """Times are seconds; `gap_p99_s` is that of all gaps between tokens, `pause_s` the longest one."""
    tally = Tally.of(load.answers, rig.references)
    records = [answer.record for answer in load.answers]
    figures: dict[str, object] = {
        "requests": tally.requests,
        "lost": tally.lost,
        "wrong_tokens": tally.wrong_tokens,
        "mixed": tally.mixed,
        "errors": tally.errors,
    }
    for name, span in (("control_", control), ("", disturbed)):
        figures[f"{name}pause_s"] = longest_pauses_s(records, [span])[0]
        figures[f"{name}gap_p99_s"] = Spread.of(pauses_within_s(records, [span])).p99_s
        figures[f"{name}tokens_per_s"] = rate_within(records, [span])
    return figures


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
