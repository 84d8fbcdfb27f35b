"""Requests that two servers could read differently: one answer, in the envelope, and the end of the connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from support.gateway_site import Site

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMUGGLED = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


async def answer_to(site: Site, *sent: bytes) -> bytes:
    """Everything that comes until the server closes the connection."""
    host, _, port = site.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in sent:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            return await reader.read()
    finally:
        writer.close()


def refusal(answer: bytes) -> dict[str, Any]:
    """The error of an answer that is a single refusal."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower() and b"application/json" in head
    error: dict[str, Any] = json.loads(body)["error"]
    return error


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (POST + b"content-length: 5\r\n" + CHUNKED + b"0\r\n\r\n" + SMUGGLED, "Content-Length"),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED, "both"),
        (POST.replace(b"1.1", b"1.0") + CHUNKED + b"0\r\n\r\n", "HTTP/1.0"),
        (b"GET /version HTTP/1.1\nhost: localhost\n\n", "CR LF"),
        (b"GET /version HTTP/1.1\r\nhost: localhost\nx-b: c\r\n\r\n", "CR LF"),
        (b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-a: b\r\n\n", "CR LF"),
        (b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-a: b\r\n c\r\n\r\n", "folded"),
        (b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-a: b\r\n\tc\r\n\r\n", "folded"),
        (b"garbage\r\n\r\n", "not a valid"),
        (b"GET /version HTTP/1.1\r\n\r\n", "not a valid"),
        (POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", "not a valid"),
        (POST + CHUNKED + b"fffffffffffffffffffffffffff\r\n", "not a valid"),
        (POST + CHUNKED + b"zz\r\n", "not a valid"),
    ],
)
async def test_what_can_be_read_in_two_ways_is_refused(site: Site, request_: bytes, words: str) -> None:
    error = refusal(await answer_to(site, request_))
    assert words in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "bad_request")
    assert not site.router.requests


async def test_a_request_is_judged_as_a_whole_however_it_arrives(site: Site) -> None:
    request = b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-a: b\r\n "
    answer = await answer_to(site, *(request[i : i + 1] for i in range(len(request))))
    assert "folded" in refusal(answer)["message"]


async def test_the_second_request_of_a_connection_is_judged_like_the_first(site: Site) -> None:
    answer = await answer_to(site, SMUGGLED, b"GET /version HTTP/1.1\nhost: localhost\n\n")
    first, second = answer.split(b"HTTP/1.1 400 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert "CR LF" in refusal(b"HTTP/1.1 400 " + second)["message"]


async def test_line_feeds_and_folds_in_a_body_are_the_bodys_own(site: Site) -> None:
    body = b'{\n "prompt": "a",\n\n "max_tokens": 1\n}\n'
    head = POST + b"connection: close\r\n"
    whole = await answer_to(site, head + b"content-length: %d\r\n\r\n" % len(body) + body)
    chunk = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    in_chunks = await answer_to(site, head + CHUNKED, chunk)
    assert whole.startswith(b"HTTP/1.1 200 ") and in_chunks.startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_breaks_the_rules_ends_its_own_request_alone(site: Site) -> None:
    half = POST + CHUNKED + b'5\r\n{"pro\r\n'
    refusal(await answer_to(site, half, b"zz\r\n"))
    fine = await answer_to(site, SMUGGLED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert fine.startswith(b"HTTP/1.1 200 ")
