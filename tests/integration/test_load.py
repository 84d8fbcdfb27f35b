"""The load generator and the observer against a real gateway with a fake router behind it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.gateway_site import Site, running_site, until

from cluster.bench.bench import Outputs, bench_server, make_plan
from cluster.bench.load import CompletionsApi, ask_model_name, completions_api
from cluster.bench.workload import LoadRequest
from cluster.observation.observer import Observer
from moesaic.errors import InternalError, InvalidArgument, Overloaded, Unavailable
from moesaic.stop_signals import StopRequested

REQUEST = LoadRequest((5, 17, 42), 6)


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    async with running_site() as it:
        yield it


@pytest_asyncio.fixture
async def api(site: Site) -> AsyncIterator[CompletionsApi]:
    async with completions_api(site.url, "fake") as it:
        yield it


async def test_every_token_of_an_answer_has_its_time(api: CompletionsApi) -> None:
    record = await api.send(REQUEST, 1.0)
    assert (record.error, record.due_s, record.prompt_tokens) == ("", 1.0, 3)
    assert record.token_ids == (5, 17, 42, 5, 17, 42)
    assert len(record.token_times_s) == 6
    assert list(record.token_times_s) == sorted(record.token_times_s)
    assert record.end_s >= record.token_times_s[-1]


async def test_an_answer_goes_on_past_the_end_of_a_sequence(site: Site, api: CompletionsApi) -> None:
    site.router.eos_after = 2
    assert len((await api.send(REQUEST, 0.0)).token_ids) == 6


async def test_a_refused_request_says_why(site: Site, api: CompletionsApi) -> None:
    site.router.error = Overloaded("the queue is full", retry_after_s=1.0)
    record = await api.send(REQUEST, 0.0)
    assert record.error == "HTTP 429: the queue is full"
    assert record.token_times_s == ()


async def test_an_answer_that_fails_half_way_is_a_failed_request(site: Site, api: CompletionsApi) -> None:
    site.router.error, site.router.error_after = InternalError("internal error"), 3
    record = await api.send(REQUEST, 0.0)
    assert record.error == "in the stream: internal error"
    assert len(record.token_times_s) == 3


async def test_a_server_that_nobody_runs_is_a_failed_request(closed_address: str) -> None:
    async with completions_api(f"http://{closed_address}", "fake") as api:
        assert "Cannot connect" in (await api.send(REQUEST, 0.0)).error


async def test_a_request_that_is_cancelled_is_cancelled_on_the_server(
    site: Site, api: CompletionsApi
) -> None:
    site.router.silent_after = 2
    sending = asyncio.create_task(api.send(REQUEST, 0.0))
    await until(lambda: site.router.num_running == 1)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await until(lambda: site.router.num_cancelled == 1)


async def test_a_server_says_what_its_model_is_called(site: Site, closed_address: str) -> None:
    assert await ask_model_name(site.url) == "fake"
    with pytest.raises(Unavailable, match="no server of the API answers"):
        await ask_model_name(f"http://{closed_address}")


async def test_a_router_without_a_controller_is_observed_alone(site: Site) -> None:
    async with Observer(site.link.address, clock=lambda: 7.0) as observer:
        seen = await observer.observe()
    assert (seen.at_s, seen.model.model, seen.problem) == (7.0, "fake", "")
    assert [(process.name, process.is_router) for process in seen.processes] == [("router", True)]
    assert seen.routers["router"].generated_tokens == 7


async def test_an_observer_without_a_router_says_so(closed_address: str) -> None:
    async with Observer(closed_address) as observer:
        with pytest.raises(Unavailable, match=f"no router answers at {closed_address}"):
            await observer.observe()


async def test_a_running_server_is_measured_and_every_failure_told(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(
        concurrency="2",
        rate="500",
        prompt_len="4-8",
        output_len="3",
        shared_prefix=2,
        requests=6,
        seed=0,
        against=None,
        pairs=5,
    )
    save, chart = tmp_path / "found.json", tmp_path / "found.png"
    await bench_server(site.url, site.link.address, plan, Outputs(True, save, chart))
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(save.read_text())
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert [row["load"]["output_tokens"] for row in found["rows"]] == [18, 18]
    assert [row["load"]["failed_requests"] for row in found["rows"]] == [0, 0]
    prompts = {tuple(request.token_ids.ids) for request in site.router.requests}
    assert len(prompts) == len(site.router.requests) == 2 + 6 + 4 + 6
    assert len({prompt[:2] for prompt in prompts}) == 1

    site.router.error = InternalError("internal error")
    with pytest.raises(Unavailable, match="12 of 12 requests failed"):
        await bench_server(site.url, site.link.address, plan, Outputs(True, None, None))


async def test_what_was_measured_before_a_signal_is_kept(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(
        concurrency="1,2",
        rate=None,
        prompt_len="4",
        output_len="8",
        shared_prefix=0,
        requests=3,
        seed=0,
        against=None,
        pairs=5,
    )
    site.router.pace_s = 0.01
    benching = asyncio.create_task(bench_server(site.url, site.link.address, plan, Outputs(True, None, None)))
    # A warm-up and three requests of the first row, then the second row, which never ends.
    await until(lambda: len(site.router.requests) > 4)
    site.router.silent_after = 1
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(StopRequested):
        await benching
    found = json.loads(capsys.readouterr().out)
    assert [row["load"]["output_tokens"] for row in found["rows"]] == [24]


async def test_prompts_that_do_not_fit_a_running_server_are_told_before_any_is_sent(site: Site) -> None:
    plan = make_plan(
        concurrency="1",
        rate=None,
        prompt_len="128",
        output_len="3",
        shared_prefix=0,
        requests=1,
        seed=0,
        against=None,
        pairs=5,
    )
    with pytest.raises(InvalidArgument, match="prompt_len: "):
        await bench_server(site.url, site.link.address, plan, Outputs(True, None, None))
    assert site.router.requests == []
