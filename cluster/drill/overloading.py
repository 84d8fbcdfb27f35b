"""Several times as many requests as a cluster can answer: what it still answers, and how it refuses the others."""

from __future__ import annotations

import asyncio
import itertools

from cluster.bench.latency import RequestRecord
from cluster.bench.load import open_loop
from cluster.bench.workload import LoadRequest, poisson_arrivals
from cluster.drill.answers import Answer, Tally
from cluster.drill.load import Load
from cluster.drill.report import Overload
from cluster.drill.rig import Rig
from cluster.drill.timeline import Span, Spread, rate_within

FACTOR = 5
# As many streams at once as give the most tokens a second.
PEAK_STREAMS = 32
PEAK_S = 20.0
# The part of the peak's time that is left out, because the cluster fills.
WARM_UP_SHARE = 0.25
TOO_MANY, UNAVAILABLE = 429, 503


async def run_overload(rig: Rig) -> Overload:
    """The peak first, then FACTOR times as many requests a second."""
    peak_s = min(PEAK_S, rig.plan.seconds)
    rig.say(f"overload: the peak, {PEAK_STREAMS} streams, {peak_s:.0f} s")
    peak_tokens_per_s = await _peak(rig, peak_s)
    peak_requests_per_s = peak_tokens_per_s / rig.requests[0].output_tokens
    rate = FACTOR * peak_requests_per_s
    rig.say(f"overload: {rate:.1f} requests a second, {rig.plan.seconds:.0f} s")
    start_s = rig.clock()
    prompts = list(
        itertools.islice(itertools.cycle(range(len(rig.requests))), round(rate * rig.plan.seconds))
    )
    records = await _offered(rig, prompts, rate)
    refused = [record for record in records if record.status in (TOO_MANY, UNAVAILABLE)]
    whole = [record for record in records if not record.error]
    answers = [
        Answer(prompt, record)
        for prompt, record in zip(prompts, records, strict=True)
        if record.status not in (TOO_MANY, UNAVAILABLE)
    ]
    return Overload(
        peak_requests_per_s=peak_requests_per_s,
        offered_requests_per_s=rate,
        peak_tokens_per_s=peak_tokens_per_s,
        good_tokens_per_s=rate_within(whole, [Span(start_s, start_s + rig.plan.seconds)]),
        refused=len(refused),
        refusals_without_retry_after=sum(record.retry_after_s is None for record in refused),
        refusal=Spread.of(record.end_s - record.due_s for record in refused),
        first_token=Spread.of(record.token_times_s[0] - record.due_s for record in whole),
        tally=Tally.of(answers, rig.references),
    )


async def _peak(rig: Rig, seconds: float) -> float:
    """Tokens a second that reach PEAK_STREAMS clients who each ask again as soon as they have their answer."""
    load = Load(rig.api.send, rig.requests, PEAK_STREAMS, rig.clock)
    start_s = rig.clock()
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        await asyncio.sleep(seconds)
        load.stop()
    records = [answer.record for answer in load.answers]
    return rate_within(records, [Span(start_s + WARM_UP_SHARE * seconds, start_s + seconds)])


async def _offered(rig: Rig, prompts: list[int], rate: float) -> list[RequestRecord]:
    """The records by request. Latencies count from the moment of sending: this process shares the cluster's cores."""

    async def send(request: LoadRequest, _: float) -> RequestRecord:
        return await rig.api.send(request, rig.clock())

    requests = [rig.requests[prompt] for prompt in prompts]
    return await open_loop(send, requests, poisson_arrivals(rate, len(requests), rig.plan.seed), rig.clock)
