"""Pages of other sites in a browser: those of named origins may use the server, and no others."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from support.fake_router import FakeRouter, running
from support.gateway_site import gateway_for, until_status

from moesaic.errors import InvalidArgument
from moesaic.settings import GatewaySettings, load_settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALLOWED, EVIL = "http://localhost:3000", "http://evil.example"


def preflight(origin: str, **headers: str) -> dict[str, str]:
    return {"origin": origin, "access-control-request-method": "POST", **headers}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that allows one origin."""
    settings = GatewaySettings(allowed_origins=(ALLOWED,))
    async with (
        running(FakeRouter()) as link,
        gateway_for(link.address, settings=settings) as (_, address),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as http,
    ):
        await until_status(http, "/ready", 200)
        yield http


async def test_a_page_of_a_named_origin_may_ask(page: httpx.AsyncClient) -> None:
    headers = {"access-control-request-headers": "authorization,content-type,x-stainless-os"}
    answer = await page.options("/v1/chat/completions", headers=preflight(ALLOWED, **headers))
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == ALLOWED
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == headers["access-control-request-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert "access-control-allow-private-network" not in answer.headers


async def test_it_may_read_answers_errors_and_streams(page: httpx.AsyncClient) -> None:
    talk = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for body, status in ((talk, 200), ({**talk, "stream": True}, 200), ({"zz": 1}, 400)):
        answer = await page.post("/v1/chat/completions", json=body, headers={"origin": ALLOWED})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ALLOWED
        assert answer.headers["vary"] == "Origin"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_a_server_on_a_private_network_may_be_asked_where_the_browser_wants_to_know(
    page: httpx.AsyncClient,
) -> None:
    headers = preflight(ALLOWED) | {"access-control-request-private-network": "true"}
    answer = await page.options("/v1/models", headers=headers)
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origin", [EVIL, "null", "http://localhost:3001", "https://localhost:3000", ""])
async def test_a_page_of_any_other_origin_is_refused_and_told_the_setting(
    page: httpx.AsyncClient, origin: str
) -> None:
    answer = await page.options("/v1/chat/completions", headers=preflight(origin))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (403, "origin_not_allowed", "Origin")
    assert "gateway.allowed_origins" in error["message"]
    read = await page.get("/v1/models", headers={"origin": origin})
    for headers in (answer.headers, read.headers):
        assert not any(name.startswith("access-control") for name in headers)


async def test_a_name_that_was_rebound_stays_refused_whatever_the_origin(page: httpx.AsyncClient) -> None:
    headers = preflight(ALLOWED) | {"host": "rebound.example"}
    answer = await page.options("/v1/chat/completions", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_host")


async def test_without_the_setting_every_preflight_is_refused() -> None:
    async with (
        gateway_for(None) as (_, address),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as http,
    ):
        answer = await http.options("/v1/chat/completions", headers=preflight(ALLOWED))
        assert answer.status_code == 403
        assert "vary" not in (await http.get("/version")).headers


@pytest.mark.parametrize(
    "origin",
    ["*", "localhost:3000", "http://localhost:3000/", "http://a.b/c", "HTTP://a.b", "null", "http://*.b"],
)
async def test_what_no_browser_sends_as_an_origin_is_refused_by_the_setting(origin: str) -> None:
    with pytest.raises(InvalidArgument, match="allowed_origins") as caught:
        load_settings(gateway={"allowed_origins": [origin]})
    assert "http://localhost:3000" in caught.value.message
