"""Bytes at the gateway's port, through a socket and the whole server: request lines, headers, bodies, several requests at once.

Whatever comes, the answer is HTTP/1.1, an error has the envelope, and who comes next is served.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import h11
import pytest
from hypothesis import strategies as st
from support.fuzzing import MAX_MESSAGE_CHARS, fuzzed
from support.gateway_site import Site, running_site
from support.mutations import bytes_near

from moesaic.addresses import split_address

# A client that hears nothing for so long ends its side. Only what it may still hear depends on it.
QUIET_S = 0.02
HUNG_S = 60.0
MAX_BODY_BYTES = 1 << 20


def request(line: str, *headers: str, body: bytes = b"", host: str = "localhost") -> bytes:
    return "\r\n".join((f"{line} HTTP/1.1", f"Host: {host}", *headers, "", "")).encode() + body


def post(path: str, body: dict[str, object], *headers: str) -> bytes:
    raw = json.dumps(body).encode()
    return request(f"POST {path}", *JSON, f"Content-Length: {len(raw)}", *headers, body=raw)


def chunked(path: str, body: bytes, *headers: str) -> bytes:
    pieces = (body[:7], body[7:], b"")
    chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return request(f"POST {path}", *JSON, "Transfer-Encoding: chunked", *headers, body=chunks)


JSON = ("Content-Type: application/json",)
PROMPT = {"prompt": "hen", "max_tokens": 2}
ORIGIN = "Origin: https://example.org"
HEALTH = request("GET /health")
REQUESTS = (
    HEALTH,
    request("GET /v1/models", "Accept: */*", "X-Request-Id: 7", f"traceparent: 00-{'1' * 32}-{'2' * 16}-01"),
    request("HEAD /ready?a=%41&b=é".encode().decode("latin-1"), "Connection: keep-alive, x"),
    request("OPTIONS /v1/completions", ORIGIN, "Access-Control-Request-Method: POST"),
    request("DELETE http://localhost/v1/models/fake", "Upgrade: websocket", "Connection: Upgrade"),
    post("/v1/completions", PROMPT, "Expect: 100-continue"),
    post("/v1/completions", {**PROMPT, "stream": True}, "Authorization: Bearer none"),
    chunked("/tokenize", json.dumps({"prompt": "hen"}).encode(), "Trailer: x"),
    post("/tokenize", {"prompt": "x" * (MAX_BODY_BYTES + 1)}),
    chunked("/tokenize", b"x" * (MAX_BODY_BYTES + 1)),
    request("GET /health", *(f"X-{number}: {'y' * 400}" for number in range(30))),
    b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
# What a little of changes where a message ends, or whose it is.
FRAGMENTS = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"0\r\n\r\n", b"\r\n ",
    b"Content-Length: 5\r\n", b"Content-Length: +5\r\n", b"Content-Length: 18446744073709551616\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity, chunked\r\n", b"Host: evil\r\n",
    b"fffffffffffffffff\r\n", b"-1\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00",
)  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """One to three requests, some with a fragment somewhere in them."""
    raw = b"".join(draw(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3)))
    for fragment in draw(st.lists(st.sampled_from(FRAGMENTS), max_size=2)):
        place = draw(st.integers(0, min(len(raw), 400)))
        raw = raw[:place] + fragment + raw[place:]
    return raw


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def site(runner: asyncio.Runner) -> Iterator[Site]:
    running = running_site()
    yield runner.run(running.__aenter__())
    runner.run(running.__aexit__(None, None, None))


@fuzzed("http_connections", conversations() | bytes_near(conversations()), examples=40)
def test_what_comes_over_a_connection_is_answered_in_http(
    raw: bytes, site: Site, runner: asyncio.Runner
) -> None:
    for status, body in answers(runner.run(talk(site, raw))):
        assert status in range(100, 500) or status == 501, f"{status}: {body[:200]!r}"
        if status >= 400 and body:
            error = json.loads(body)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert 0 < len(error["message"]) <= MAX_MESSAGE_CHARS
    ((status, _),) = answers(runner.run(ask(site, request("GET /health", "Connection: close"))))
    assert status == 200


async def ask(site: Site, raw: bytes) -> bytes:
    """All that the gateway says until it ends the connection."""
    async with asyncio.timeout(HUNG_S):
        reader, writer = await asyncio.open_connection(*split_address(site.address))
        writer.write(raw)
        heard = await reader.read()
        writer.close()
        return heard


async def talk(site: Site, raw: bytes) -> bytes:
    """All that the gateway says to a client that sends this, and then goes when it hears nothing more."""
    async with asyncio.timeout(HUNG_S):
        reader, writer = await asyncio.open_connection(*split_address(site.address))
        heard = b""
        try:
            writer.write(raw)
            while heard_now := await _hear(reader):
                heard += heard_now
            writer.write_eof()
            return heard + await reader.read()
        except OSError:  # it was refused, and the gateway has gone
            return heard
        finally:
            writer.close()


async def _hear(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(QUIET_S):
            return await reader.read(1 << 16)
    except TimeoutError:
        return b""


def answers(heard: bytes) -> list[tuple[int, bytes]]:
    """Statuses and bodies; the last one may have been cut off."""
    found: list[tuple[int, bytes]] = []
    while heard:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("host", "localhost")]))
        client.receive_data(heard)
        status, body = 0, b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return found
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
        found.append((status, body))
        heard = client.trailing_data[0]
    return found
