"""Several routers behind one gateway: who gets which request, and what becomes of requests when one of them goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
from support.fake_router import FakeRouter, RunningRouter, running
from support.gateway_site import events, until, until_status

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from moesaic import errors
from moesaic.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway in front of several fake routers."""

    gateway: GatewayServer
    links: list[RunningRouter]
    http: httpx.AsyncClient

    @property
    def routers(self) -> list[FakeRouter]:
        return [link.router for link in self.links]

    async def complete(self, prompt: str, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2, **body})

    def counts(self) -> list[int]:
        return [len(router.requests) for router in self.routers]


@asynccontextmanager
async def site_of(*routers: FakeRouter, settings: GatewaySettings | None = None) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        links = [await stack.enter_async_context(running(router)) for router in routers]
        gateway = GatewayServer(
            GatewayConfig("127.0.0.1", 0, settings or GatewaySettings()),
            {f"router-{index}": partial(_itself, link.address) for index, link in enumerate(links)},
        )
        address = await gateway.start()
        stack.push_async_callback(gateway.stop, 0)
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://{address}", timeout=10))
        await until_status(http, "/ready", 200)
        await until(lambda: len(gateway.serving_routers) == len(links))
        yield Site(gateway, links, http)


async def _itself(address: str) -> str:
    return address


def two() -> tuple[FakeRouter, FakeRouter]:
    return FakeRouter(), FakeRouter()


async def test_requests_at_once_are_shared_out_evenly() -> None:
    async with site_of(*two()) as site:
        for router in site.routers:
            router.pace_s = 0.05
        await asyncio.gather(*(site.complete(f"{index} bottles") for index in range(12)))
        assert site.counts() == [6, 6]


async def test_the_prompts_of_one_request_are_shared_out_too() -> None:
    async with site_of(*two()) as site:
        prompts = [f"{index} bottles" for index in range(8)]
        reply = await site.http.post("/v1/completions", json={"prompt": prompts, "max_tokens": 2})
        assert [choice["text"] for choice in reply.json()["choices"]] == [prompt[:2] for prompt in prompts]
        assert site.counts() == [4, 4]


async def test_prompts_that_begin_alike_meet_the_same_router() -> None:
    async with site_of(*two()) as site:
        for index in range(6):
            await site.complete("x" * 100, max_tokens=1 + index)
            await site.complete(f"another {index}")
        shared = [sum(request.text == "x" * 100 for request in it.requests) for it in site.routers]
        assert sorted(shared) == [0, 6]


async def test_a_policy_does_not_follow_the_prefix_of_other_requests() -> None:
    async with site_of(*two()) as site:
        for router in site.routers:
            router.silent_after = 0
        same = asyncio.create_task(site.complete("x" * 100))
        await until(lambda: sum(site.counts()) == 1)
        home = site.counts().index(1)
        site.routers[1 - home].silent_after = None
        await site.complete("x" * 100, experts={"deny": ["maths-v1"]})
        await site.complete("x" * 100, epoch="e1")
        assert site.counts()[1 - home] == 2
        same.cancel()


async def test_the_gateway_is_ready_as_long_as_one_router_serves() -> None:
    async with site_of(*two()) as site:
        first, second = site.links
        await first.set_serving(False)
        await until(lambda: "router-0" not in site.gateway.serving_routers)
        assert (await site.http.get("/health")).status_code == 200
        assert [(await site.complete(f"{index}")).status_code for index in range(4)] == [200] * 4
        assert site.counts() == [0, 4]
        await second.set_serving(False)
        await until_status(site.http, "/health", 503)
        await first.set_serving(True)
        await until_status(site.http, "/health", 200)


async def test_a_request_that_its_router_never_began_is_answered_by_another_when_that_one_dies() -> None:
    async with site_of(*two()) as site:
        for router in site.routers:
            router.silent_after = 0
        asked = asyncio.create_task(site.complete("ab"))
        await until(lambda: sum(site.counts()) == 1)
        dying = site.counts().index(1)
        site.routers[1 - dying].silent_after = None
        await site.links[dying].kill()
        reply = await asked
        assert (reply.status_code, reply.json()["choices"][0]["text"]) == (200, "ab")
        assert site.counts() == [1, 1]


async def test_a_request_whose_prompt_was_read_begins_again_when_its_router_dies() -> None:
    async with site_of(*two()) as site:
        for router in site.routers:
            router.prompt_ahead, router.silent_after = True, 0
        asked = asyncio.create_task(site.complete("ab", echo=True))
        await until(lambda: sum(router.num_sent for router in site.routers) == 1)
        dying = site.counts().index(1)
        await asyncio.sleep(0.05)
        site.routers[1 - dying].silent_after = None
        await site.links[dying].kill()
        assert (await asked).json()["choices"][0]["text"] == "abab"
        (request,) = site.routers[1 - dying].requests
        assert not request.HasField("resume")


async def begun(site: Site, **body: Any) -> tuple[asyncio.Task[httpx.Response], int]:
    """A request whose router has fallen silent after the first token of each choice, and the number of that router."""
    for router in site.routers:
        router.silent_after = 1
    asked = asyncio.create_task(site.complete("abcd", **{"max_tokens": 6, **body}))
    await until(lambda: sum(site.counts()) == 1)
    index = site.counts().index(1)
    await until(lambda: site.routers[index].num_sent == body.get("n", 1))
    await asyncio.sleep(0.05)  # the messages are on their way
    return asked, index


def texts(reply: httpx.Response) -> list[str]:
    """The text of each choice of a stream."""
    found: dict[int, str] = {}
    for chunk in events(reply.text)[:-1]:
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("body", [{}, {"n": 3}, {"stop": "dab"}, {"echo": True}])
async def test_an_answer_whose_router_dies_goes_on_at_another(body: dict[str, Any]) -> None:
    wanted = {"stream": True, "logprobs": 1, "return_token_ids": True, **body}
    async with site_of(*two()) as site:
        undisturbed = events((await site.complete("abcd", max_tokens=6, **wanted)).text)
        for router in site.routers:
            router.reset()
        asked, dying = await begun(site, **wanted)
        site.routers[1 - dying].silent_after = None
        await site.links[dying].kill()
        chunks = events((await asked).text)
        assert [chunk["choices"] for chunk in chunks[:-1]] == [it["choices"] for it in undisturbed[:-1]]
        assert chunks[-1] == "[DONE]"
        (request,) = site.routers[1 - dying].requests
        assert request.epoch == "e1" and request.sampling.seed == 1234
        assert [list(it.token_ids) for it in request.resume.continuations] == [
            [97 + index] for index in range(body.get("n", 1))
        ]


async def test_an_answer_that_is_not_streamed_goes_on_as_well() -> None:
    async with site_of(*two()) as site:
        asked, dying = await begun(site)
        site.routers[1 - dying].silent_after = None
        await site.links[dying].kill()
        reply = (await asked).json()
        assert reply["choices"][0]["text"] == "abcdab" and reply["usage"]["completion_tokens"] == 6


async def test_an_answer_waits_for_its_router_where_there_is_no_other() -> None:
    async with site_of(FakeRouter()) as site:
        asked, _ = await begun(site, stream=True)
        await site.links[0].kill()
        await until(lambda: not site.gateway.serving_routers)
        port = int(site.links[0].address.rpartition(":")[2])
        async with running(FakeRouter(), port=port) as restarted:
            assert texts(await asked) == ["abcdab"]
            assert len(restarted.router.requests) == 1


async def test_an_answer_whose_router_does_not_return_in_time_says_how_far_it_came() -> None:
    async with site_of(FakeRouter(), settings=GatewaySettings(request_timeout_s=1.0)) as site:
        asked, _ = await begun(site, stream=True)
        await site.links[0].kill()
        last = events((await asked).text)[-1]
        assert (last["error"]["code"], last["offset"]) == ("router_unreachable", 1)


async def test_who_waits_for_a_router_hears_that_the_gateway_stops() -> None:
    async with site_of(FakeRouter()) as site:
        asked, _ = await begun(site, stream=True)
        await site.links[0].kill()
        await until(lambda: not site.gateway.serving_routers)
        await site.gateway.stop(0)
        last = events((await asked).text)[-1]
        assert (last["error"]["code"], last["offset"]) == ("stopping", 1)


async def test_an_answer_whose_router_stops_goes_on_at_another() -> None:
    async with site_of(*two()) as site:
        for router in site.routers:
            router.error, router.error_after = errors.Unavailable("stopping", reason="STOPPING"), 2
        assert texts(await site.complete("abcd", max_tokens=6, stream=True)) == ["abcdab"]
        assert sum(site.counts()) == 3


async def test_a_router_that_refuses_the_rest_of_an_answer_is_asked_again() -> None:
    async with site_of(*two()) as site:
        asked, dying = await begun(site, stream=True)
        other = site.routers[1 - dying]
        other.error = errors.Overloaded("too many requests wait", reason="QUEUE_FULL")
        await site.links[dying].kill()
        await until(lambda: len(other.requests) == 2)
        other.error = other.silent_after = None
        assert texts(await asked) == ["abcdab"]


async def test_an_epoch_that_is_gone_is_not_waited_for_for_ever() -> None:
    async with site_of(*two()) as site:
        asked, dying = await begun(site, stream=True)
        other = site.routers[1 - dying]
        other.error = errors.FailedPrecondition("epoch: not held", field="epoch", reason="EPOCH_UNKNOWN")
        await site.links[dying].kill()
        last = events((await asked).text)[-1]
        assert (last["error"]["code"], last["offset"]) == ("epoch_unknown", 1)
        assert len(other.requests) <= 8


async def test_an_error_of_the_answer_itself_is_not_tried_elsewhere() -> None:
    async with site_of(*two()) as site:
        for router in site.routers:
            router.error, router.error_after = errors.Unavailable("no replica", reason="NO_REPLICA"), 1
        last = events((await site.complete("abcd", stream=True)).text)[-1]
        assert (last["error"]["code"], last["offset"]) == ("no_replica", 1)
        assert sum(site.counts()) == 1


async def test_after_the_death_of_a_router_new_requests_are_answered_at_once() -> None:
    async with site_of(*two()) as site:
        await site.links[0].kill()
        replies = [await site.complete(f"{index} bottles") for index in range(6)]
        assert [reply.status_code for reply in replies] == [200] * 6
        assert (await site.http.get("/health")).status_code == 200
        assert (await site.http.get("/v1/models")).status_code == 200
        assert (await site.http.post("/tokenize", json={"prompt": "ab"})).status_code == 200


@pytest.mark.parametrize(
    "refusal",
    [
        errors.Unavailable("the router is draining", reason="DRAINING"),
        errors.Overloaded("too many requests wait", reason="QUEUE_FULL"),
        errors.FailedPrecondition("epoch: not held", field="epoch", reason="EPOCH_UNKNOWN"),
        errors.FailedPrecondition("not there yet", field="experts.require", reason="EXPERTS_MISSING"),
    ],
)
async def test_a_router_that_cannot_take_it_sends_its_request_to_another(refusal: Exception) -> None:
    async with site_of(FakeRouter(error=refusal), FakeRouter()) as site:
        replies = [await site.complete(f"{index} bottles") for index in range(8)]
        assert [reply.status_code for reply in replies] == [200] * 8
        assert len(site.routers[0].requests) > 0


async def test_two_refusals_are_enough() -> None:
    full = errors.Overloaded("too many requests wait", reason="QUEUE_FULL")
    async with site_of(*(FakeRouter(error=full) for _ in range(3))) as site:
        assert (await site.complete("ab")).status_code == 429
        assert sum(site.counts()) == 2


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgument("temperature must be in [0, 2]", field="temperature"),
        errors.Unavailable("layer 3: no worker holds an expert that is needed"),
        errors.InternalError("internal error"),
    ],
)
async def test_what_every_router_would_say_is_said_by_one(error: Exception) -> None:
    async with site_of(FakeRouter(error=error), FakeRouter(error=error)) as site:
        assert (await site.complete("ab")).status_code in (400, 500, 503)
        assert sum(site.counts()) == 1


async def test_a_second_try_has_only_the_time_that_is_left() -> None:
    async with site_of(*two(), settings=GatewaySettings(request_timeout_s=8.0)) as site:
        for router in site.routers:
            router.silent_after = 0
        asked = asyncio.create_task(site.complete("ab"))
        await until(lambda: sum(site.counts()) == 1)
        dying = site.counts().index(1)
        await asyncio.sleep(0.3)
        site.routers[1 - dying].silent_after = None
        await site.links[dying].kill()
        assert (await asked).status_code == 200
        (left_s,) = site.routers[1 - dying].time_left_s
        assert left_s is not None and left_s <= 7.7
