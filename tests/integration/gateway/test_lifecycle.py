"""Clients that leave, routers that come and go, a gateway that starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time

import httpx
import pytest
from support.fake_router import FakeRouter, running
from support.gateway_site import Site, events, gateway_for, request_lines, until, until_status

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from moesaic import errors
from moesaic.settings import GatewaySettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Clients that leave, routers that come and go


@pytest.mark.parametrize(("stream", "silent_after"), [(True, 2), (True, 0), (False, 2)])
async def test_a_client_that_leaves_cancels_its_calls_at_once(
    site: Site, stream: bool, silent_after: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    site.router.silent_after = silent_after
    async with httpx.AsyncClient(base_url=site.url) as http:
        task = asyncio.create_task(
            http.post("/v1/completions", json={"prompt": ["ab", "cd"], "stream": stream})
        )
        await until(lambda: site.router.num_running == 2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await until(lambda: site.router.num_cancelled == 2)
    await until(lambda: bool(request_lines(caplog)))
    assert [line["status"] for line in request_lines(caplog)] == [499]


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host, port = site.address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    )
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()
    await until(lambda: bool(request_lines(caplog)))
    assert [line["status"] for line in request_lines(caplog)] == [499]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_gateway_without_a_router_listens_and_is_not_ready() -> None:
    async with gateway_for(None) as (_, address), httpx.AsyncClient(base_url=f"http://{address}") as http:
        for path in ("/ready", "/health", "/v1/models"):
            response = await http.get(path)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
        response = await http.post("/v1/completions", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_router")
        assert (await http.get("/version")).status_code == 200


async def test_readiness_follows_the_health_of_the_router() -> None:
    async with (
        running(FakeRouter(), serving=False) as link,
        gateway_for(link.address) as (_, address),
        httpx.AsyncClient(base_url=f"http://{address}") as http,
    ):
        await until_status(http, "/ready", 503)
        await link.set_serving(True)
        await until_status(http, "/ready", 200)
        await link.set_serving(False)
        await until_status(http, "/ready", 503)


async def test_a_router_that_comes_back_elsewhere_is_found() -> None:
    addresses: list[str] = []

    async def resolve_router() -> str:
        return addresses[-1]

    gateway = GatewayServer(GatewayConfig("127.0.0.1", 0, GatewaySettings()), {"router": resolve_router})
    address = await gateway.start()
    body = {"prompt": "ab", "max_tokens": 2}
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as http:
            async with running(FakeRouter(epoch="before")) as first:
                addresses.append(first.address)
                await until_status(http, "/ready", 200)
                assert (await http.post("/v1/completions", json=body)).json()["epoch"] == "before"
            await until_status(http, "/ready", 503)
            refused = await http.post("/v1/completions", json=body)
            assert refused.status_code == 503
            assert "127.0.0.1" not in refused.text
            async with running(FakeRouter(epoch="after")) as second:
                addresses.append(second.address)
                await until_status(http, "/ready", 200)
                assert (await http.post("/v1/completions", json=body)).json()["epoch"] == "after"
    finally:
        await gateway.stop(0)


# Start and stop


async def test_a_port_in_use_is_an_error_that_says_so(closed_address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = GatewayConfig("127.0.0.1", taken.getsockname()[1], GatewaySettings())

        async def resolve_router() -> str:
            return closed_address

        with pytest.raises(errors.InvalidArgument, match="in use") as caught:
            await GatewayServer(config, {"router": resolve_router}).start()
    assert (caught.value.field, caught.value.reason) == ("port", "PORT_IN_USE")


async def test_a_stop_lets_running_answers_end(own_site: Site, own_http: httpx.AsyncClient) -> None:
    own_site.router.pace_s = 0.05
    task = asyncio.create_task(
        own_http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 6, "stream": True})
    )
    await until(lambda: own_site.router.num_running == 1)
    await own_site.gateway.stop(5)
    chunks = events((await task).text)
    assert chunks[-1] == "[DONE]" and len(chunks) == 7
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(base_url=own_site.url) as late:
            await late.get("/version")


async def test_what_outlives_the_drain_ends_with_an_error(
    own_site: Site, own_http: httpx.AsyncClient
) -> None:
    own_site.router.silent_after = 1
    streaming = asyncio.create_task(own_http.post("/v1/completions", json={"prompt": "ab", "stream": True}))
    waiting = asyncio.create_task(own_http.post("/v1/completions", json={"prompt": "ab"}))
    await until(lambda: own_site.router.num_running == 2)
    await asyncio.sleep(0.05)
    started = time.monotonic()
    await own_site.gateway.stop(0.1)
    assert time.monotonic() - started < 2
    assert events((await streaming).text)[-1]["error"]["code"] == "stopping"
    assert (await waiting).status_code == 503


async def test_the_process_starts_by_hand_serves_and_ends_on_sigterm() -> None:
    async with running(FakeRouter()) as link:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--router", link.address, "--port", "0"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
            address = line.split()[1].removeprefix("http=")
            async with httpx.AsyncClient(base_url=f"http://{address}") as http:
                await until_status(http, "/ready", 200)
                reply = await http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
            assert reply.json()["choices"][0]["text"] == "ab"
            process.send_signal(signal.SIGTERM)
            _, logs = await asyncio.wait_for(process.communicate(), 20)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    lines = [json.loads(it) for it in logs.splitlines()]
    assert any(it["message"] == "request" and it["status"] == 200 for it in lines)


async def test_a_bad_start_by_hand_says_why_without_a_stack(closed_address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--router", closed_address),
            *("--port", str(taken.getsockname()[1])),
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert b"in use" in stderr and b"Traceback" not in stderr
