"""The load of a drill over real HTTP: what its clients learn of every answer, and what happens when they leave."""

from __future__ import annotations

import asyncio
import time

from support.gateway_site import running_site, until

from cluster.bench.latency import RequestRecord
from cluster.bench.load import completions_api
from cluster.bench.workload import LoadRequest
from cluster.drill.answers import Answer, Tally
from cluster.drill.load import Load
from moesaic.errors import InternalError, Overloaded

REQUEST = LoadRequest((72, 105, 33), 3)


async def asked(error: Exception | None = None, error_after: int = 0) -> RequestRecord:
    async with running_site() as site, completions_api(site.url, "fake", timeout_s=20.0) as api:
        site.router.error, site.router.error_after = error, error_after
        return await api.send(REQUEST, time.perf_counter())


async def test_an_answer_names_its_one_epoch() -> None:
    record = await asked()
    assert (record.error, len(record.token_ids)) == ("", 3)
    assert record.epochs == {"e1"}


async def test_a_refusal_brings_its_status_and_when_to_come_back() -> None:
    record = await asked(Overloaded("full", retry_after_s=3.0))
    assert (record.status, record.retry_after_s) == (429, 3.0)
    assert record.error.startswith("HTTP 429")


async def test_an_answer_that_breaks_off_keeps_its_tokens_and_is_no_refusal() -> None:
    record = await asked(InternalError("broken"), error_after=2)
    assert (record.status, record.retry_after_s, len(record.token_ids)) == (0, None, 2)
    assert record.error


async def test_a_load_runs_until_it_is_stopped_and_every_token_is_right() -> None:
    async with running_site() as site, completions_api(site.url, "fake", timeout_s=20.0) as api:
        references = {"e1": [(await api.send(REQUEST, 0.0)).token_ids]}
        load = Load(api.send, [REQUEST], 4, time.perf_counter)
        running = asyncio.create_task(load.run())
        await until(lambda: len(load.answers) >= 20)
        load.stop()
        await running
        assert site.router.max_running <= 4
    assert Tally.of(load.answers, references) == Tally(len(load.answers), 0, 0, 0, 0, {})
    wrong = [Answer(0, load.answers[0].record)]
    assert Tally.of(wrong, {"e1": [(0, 0, 0)]}).wrong_tokens == 3


async def test_a_client_that_leaves_takes_its_work_along() -> None:
    async with running_site() as site, completions_api(site.url, "fake", timeout_s=20.0) as api:
        site.router.silent_after = 1
        leaving = asyncio.create_task(api.send(REQUEST, 0.0))
        await until(lambda: site.router.num_running == 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await asyncio.wait_for(site.router.cancelled.wait(), 10.0)
