"""The gateway as its clients meet it: openai-python and plain HTTP, a real server, a fake router over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from support.fake_router import FakeRouter, RunningRouter, logprob_at, running

from gateway.edge import MAX_ACTIVE
from gateway.server import GatewayConfig, GatewayServer
from moesaic import errors
from moesaic.settings import GatewaySettings

MARKER = "xyzzymarkerxyzzy"


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway in front of a fake router."""

    router: FakeRouter
    link: RunningRouter
    gateway: GatewayServer
    address: str

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, "timeout": 10, **options}
        )


@contextlib.asynccontextmanager
async def gateway_for(
    address: str | None, *, host: str = "127.0.0.1", settings: GatewaySettings | None = None
) -> AsyncIterator[tuple[GatewayServer, str]]:
    async def resolve_router() -> str:
        if address is None:
            raise errors.Unavailable("no router yet")
        return address

    settings = settings or GatewaySettings(max_body_mib=1)
    gateway = GatewayServer(GatewayConfig(host, 0, settings), resolve_router)
    listening = await gateway.start()
    try:
        yield gateway, listening
    finally:
        await gateway.stop(0)


async def until_status(http: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    deadline = time.monotonic() + 10
    while (response := await http.get(path)).status_code != status:
        assert time.monotonic() < deadline, f"{path} still answers {response.status_code}"
        await asyncio.sleep(0.02)
    return response


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with (
        running(FakeRouter()) as link,
        gateway_for(link.address) as (gateway, address),
        httpx.AsyncClient(base_url=f"http://{address}") as http,
    ):
        await until_status(http, "/ready", 200)
        yield Site(link.router, link, gateway, address)


@pytest.fixture
async def http(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=site.url, timeout=10) as client:
        yield client


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with site.openai() as it:
        yield it


def events(text: str) -> list[Any]:
    """The data of each event of a stream; [DONE] as that string."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# Completions


async def test_a_completion_has_text_usage_and_the_epoch(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="fake", prompt="abc", max_tokens=5)
    assert reply.choices[0].text == "abcab"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 5, 8)
    assert reply.model_extra == {"epoch": "e1"}
    assert (reply.object, reply.model) == ("text_completion", "fake")


async def test_a_stream_has_one_chunk_a_token_and_usage_at_its_end(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fake", prompt="abc", max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["a", "b", "c", "a"]
    assert chunks[3].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


async def test_stop_n_and_several_prompts(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model="fake", prompt=["abc", "xyz"], n=2, max_tokens=8, stop=["ca", "zx"]
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == ["ab", "b", "xy", "y"]
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert reply.usage is not None and reply.usage.prompt_tokens == 6


async def test_a_stream_of_several_choices_interleaves_them_by_index(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fake", prompt=["abc", "xyz"], n=2, max_tokens=3, stream=True
    )
    texts = dict.fromkeys(range(4), "")
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "abc", 1: "bca", 2: "xyz", 3: "yzx"}


async def test_a_scoring_client_gets_the_exact_log_probabilities_of_its_prompt(site: Site) -> None:
    body = {
        "model": "fake",
        "prompt": [[97, 98, 99, 100], [120, 121]],
        "echo": True,
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
        "seed": 1234,
    }
    async with httpx.AsyncClient(base_url=site.url) as http:
        reply = (await http.post("/v1/completions", json=body)).json()
    for choice, length in zip(reply["choices"], (4, 2), strict=True):
        values = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert values == [None, *(logprob_at(position) for position in range(1, length + 1))]
        assert len(choice["logprobs"]["tokens"]) == len(tops) == length + 1
        assert tops[0] is None and all(top for top in tops[1:])
        greedy = [value == max(top.values()) for value, top in zip(values[1:], tops[1:], strict=True)]
        assert greedy == [position % 2 == 0 for position in range(1, length + 1)]
    assert reply["choices"][0]["text"] == "abcda"
    assert reply["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


async def test_echo_without_a_token_scores_the_prompt_alone(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="fake", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs is not None and choice.logprobs.tokens == ["a", "b", "c"]
    assert reply.usage is not None and reply.usage.completion_tokens == 0


async def test_echo_in_a_stream_comes_with_the_first_token(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fake", prompt="abc", max_tokens=2, echo=True, logprobs=0, stream=True
    )
    chunks = [chunk.choices[0] async for chunk in stream]
    assert [chunk.text for chunk in chunks] == ["abca", "b"]
    assert [len((chunk.logprobs and chunk.logprobs.tokens) or []) for chunk in chunks] == [4, 1]
    assert chunks[1].logprobs is not None and chunks[1].logprobs.text_offset == [4]


async def test_token_ids_come_back_when_asked_for(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model="fake", prompt="ab", max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert reply.choices[0].model_extra is not None
    assert reply.choices[0].model_extra["token_ids"] == [97, 98, 97]
    assert reply.choices[0].model_extra["prompt_token_ids"] == [97, 98]


async def test_a_model_without_a_tokenizer_serves_token_ids(site: Site, client: openai.AsyncOpenAI) -> None:
    site.router.has_tokenizer = False
    reply = await client.completions.create(
        model="fake", prompt=[5, 6], max_tokens=2, logprobs=1, extra_body={"return_token_ids": True}
    )
    assert reply.choices[0].text == ""
    assert reply.choices[0].model_extra is not None and reply.choices[0].model_extra["token_ids"] == [5, 6]
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.tokens == [
        "token_id:5",
        "token_id:6",
    ]
    with pytest.raises(openai.BadRequestError, match="no tokenizer"):
        await client.completions.create(model="fake", prompt="text", max_tokens=2)


async def test_the_habits_of_benchmark_clients_are_accepted(http: httpx.AsyncClient) -> None:
    body = {
        "model": "fake",
        "prompt": "abc",
        "max_tokens": 3,
        "repetition_penalty": 1.0,
        "logprobs": None,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    chunks = events((await http.post("/v1/completions", json=body)).text)
    assert chunks[-1] == "[DONE]"
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]] == [1, 2, 3, 3]


async def test_many_prompts_of_one_request_reach_the_router_a_few_at_a_time(
    site: Site, client: openai.AsyncOpenAI
) -> None:
    prompts = [[97 + i % 20] for i in range(100)]
    reply = await client.completions.create(model="fake", prompt=prompts, max_tokens=1)
    assert [choice.text for choice in reply.choices] == [chr(prompt[0]) for prompt in prompts]
    assert 1 < site.router.max_running <= 32


# Chat


async def test_a_chat_answers_and_streams_the_same(client: openai.AsyncOpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
    ]
    reply = await client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=6)
    assert reply.choices[0].message.content == "<syste"
    assert (reply.choices[0].message.role, reply.choices[0].finish_reason) == ("assistant", "length")
    stream = await client.chat.completions.create(model="fake", messages=messages, max_tokens=6, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert chunks[0].delta.role == "assistant"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "<syste"
    assert chunks[-1].finish_reason == "length"


async def test_the_reply_of_a_chat_can_be_sent_back(client: openai.AsyncOpenAI, site: Site) -> None:
    first = await client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "u"}], max_tokens=3
    )
    turn: Any = first.choices[0].message.model_dump()
    await client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "u"}, turn], max_tokens=1
    )
    assert [message.role for message in site.router.requests[1].chat.messages] == ["user", "assistant"]


async def test_a_chat_gives_log_probabilities_and_token_ids(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "u", "content": "x"}],  # type: ignore[list-item, misc]
        max_tokens=2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True, "chat_template_kwargs": {"a": 1}},
    )
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content is not None
    token = reply.choices[0].logprobs.content[0]
    assert (token.token, token.bytes, len(token.top_logprobs)) == ("<", [60], 2)
    assert reply.model_extra is not None and reply.model_extra["prompt_token_ids"] == list(b"<u:x>")
    assert reply.choices[0].model_extra is not None and reply.choices[0].model_extra["token_ids"] == [60, 117]


# Other routes


async def test_models_tokens_version_and_state(
    site: Site, http: httpx.AsyncClient, client: openai.AsyncOpenAI
) -> None:
    (model,) = (await client.models.list()).data
    assert (model.id, model.model_extra) == ("fake", {"max_model_len": 128})
    assert (await client.models.retrieve("fake")).id == "fake"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/other")
    tokens = await http.post("/tokenize", json={"model": "fake", "prompt": "ab", "return_token_strs": True})
    assert tokens.json() == {
        "count": 2,
        "max_model_len": 128,
        "tokens": [97, 98],
        "token_strs": ["<97>", "<98>"],
    }
    talk = await http.post("/tokenize", json={"messages": [{"role": "u", "content": "x"}]})
    assert talk.json() == {"count": 5, "max_model_len": 128, "tokens": list(b"<u:x>")}
    assert (await http.post("/detokenize", json={"tokens": [97, 98]})).json() == {"prompt": "ab"}
    assert set((await http.get("/version")).json()) == {"version"}
    health = await http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    schema = (await http.get("/openapi.json")).json()
    assert "/v1/chat/completions" in schema["paths"]


# Errors


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_argument"),
        ({"max_tokens": 1000}, "prompt", "context_length_exceeded"),
        ({"prompt": [999]}, "prompt", "invalid_argument"),
        ({"prompt": ""}, "prompt", "invalid_argument"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of", "invalid_argument"),
        ({"extra_body": {"suffix": "x"}}, "suffix", "invalid_argument"),
        ({"extra_body": {"best_of": 4}}, "best_of", "invalid_argument"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_names_its_parameter(
    client: openai.AsyncOpenAI, options: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(**{"model": "fake", "prompt": "abc", "stream": stream, **options})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


async def test_a_chat_that_does_not_fit_blames_its_messages(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="this model's maximum context length is 128") as caught:
        await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x" * 200}])
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="other", prompt="abc")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


async def test_a_full_queue_is_tried_again_by_the_client(site: Site) -> None:
    site.router.error = errors.Overloaded("the queue is full", retry_after_s=0.5)
    async with site.openai(max_retries=1) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="fake", prompt="abc")
    assert caught.value.response.headers["retry-after"] == "1"
    assert len(site.router.requests) == 2


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            errors.Unavailable("layer 3 slot 1 has no replica left", reason="NO_REPLICA"),
            503,
            "layer 3 slot 1",
        ),
        (errors.DataLoss("expert output rejected"), 503, "expert output rejected"),
        (errors.Unsupported("beam search is not supported", field="n"), 400, "beam search"),
        (errors.DeadlineExceeded("deadline after 3 tokens"), 504, "deadline after 3"),
        (RuntimeError(MARKER), 500, "internal error"),
    ],
)
async def test_an_error_of_the_router_has_its_status_and_no_internals(
    site: Site, http: httpx.AsyncClient, error: Exception, status: int, message: str
) -> None:
    site.router.error = error
    response = await http.post("/v1/completions", json={"prompt": "abc"})
    assert response.status_code == status
    assert message in response.json()["error"]["message"] and MARKER not in response.text
    assert ("retry-after" in response.headers) == (status == 503)
    assert (response.headers.get("x-should-retry") == "false") == (status != 503)


async def test_a_router_that_takes_too_long_is_a_gateway_timeout() -> None:
    async with running(FakeRouter(silent_after=0)) as link:
        settings = GatewaySettings(request_timeout_s=0.3)
        async with gateway_for(link.address, settings=settings) as (_, address):
            async with httpx.AsyncClient(base_url=f"http://{address}") as http:
                await until_status(http, "/ready", 200)
                response = await http.post("/v1/completions", json={"prompt": "abc"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


async def test_an_error_in_mid_stream_is_the_last_event(site: Site, http: httpx.AsyncClient) -> None:
    site.router.error, site.router.error_after = errors.Unavailable("no replica", reason="NO_REPLICA"), 2
    body = {"prompt": "abc", "stream": True, "max_tokens": 9}
    chunks = events((await http.post("/v1/completions", json=body)).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks[:2]] == ["a", "b"]
    assert chunks[2:] == [
        {
            "error": {"message": "no replica", "type": "server_error", "param": None, "code": "no_replica"},
            "offset": 2,
        }
    ]
    async with site.openai() as client:
        stream = await client.completions.create(model="fake", prompt="abc", max_tokens=9, stream=True)
        with pytest.raises(openai.APIError, match="no replica"):
            _ = [chunk async for chunk in stream]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("GET", "/nowhere", None, {}, 404, "not_found"),
        ("GET", "/v1/models/", None, {}, 404, "model_not_found"),
        ("GET", "/v1/completions", None, {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", None, {}, 405, "method_not_allowed"),
        ("POST", "/v1/completions", b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", b"{}", {}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", b"", {"content-type": "application/json"}, 400, "invalid_argument"),
        ("POST", "/v1/completions", b"{", {"content-type": "application/json"}, 400, "invalid_argument"),
        ("POST", "/v1/completions", b"[]", {"content-type": "application/json"}, 400, "invalid_argument"),
        ("POST", "/v1/completions", b"null", {"content-type": "application/json"}, 400, "invalid_argument"),
        (
            "POST",
            "/v1/completions",
            b"{" * 99999,
            {"content-type": "application/json"},
            400,
            "invalid_argument",
        ),
        ("GET", "/health", None, {"host": "evil.example"}, 400, "bad_host"),
        ("GET", "/health", None, {"host": "[::"}, 400, "bad_host"),
        ("GET", "/health", None, {"x-long": "x" * 9000}, 431, "headers_too_large"),
    ],
)
async def test_every_refusal_has_the_envelope(
    http: httpx.AsyncClient,
    method: str,
    path: str,
    content: bytes | None,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    response = await http.request(method, path, content=content, headers=headers)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code
    assert response.headers["x-request-id"]


async def test_nan_is_refused_by_the_name_of_its_field(http: httpx.AsyncClient) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        response = await http.post(
            "/v1/completions",
            content=f'{{"prompt": "a", "temperature": {number}}}',
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_so(
    http: httpx.AsyncClient, site: Site, declared: bool
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    content: Any = b" " * 2_000_000 if declared else endless()
    response = await http.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["message"] == f"the body exceeds {1 << 20} bytes"
    assert not site.router.requests
    assert (await http.get("/health")).status_code == 200


async def test_no_page_of_another_site_may_read_an_answer(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/models", headers={"origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in response.headers)
    preflight = await http.options("/v1/completions", headers={"origin": "http://evil.example"})
    assert preflight.status_code == 405


async def test_a_gateway_off_loopback_answers_to_any_name() -> None:
    async with gateway_for(None, host="0.0.0.0") as (_, address):
        port = address.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            response = await http.get("/version", headers={"host": "llm.example:80"})
    assert response.status_code == 200


async def test_one_request_too_many_is_refused_but_probes_are_not(
    site: Site, http: httpx.AsyncClient
) -> None:
    edge = site.gateway._http.config.app
    edge._num_active = MAX_ACTIVE  # type: ignore[union-attr]
    assert (await http.get("/v1/models")).status_code == 429
    assert (await http.get("/health")).status_code == 200


# Request ids, traces, logs


async def test_request_ids_are_echoed_and_reach_the_router(site: Site, http: httpx.AsyncClient) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 1}
    response = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "job-7.A_z"})
    assert response.headers["x-request-id"] == "job-7.A_z"
    assert response.json()["id"] == "cmpl-job-7.A_z"
    assert {request.request_id for request in site.router.requests} == {"job-7.A_z-0", "job-7.A_z-1"}
    assert site.router.metadata[0]["x-request-id"] == site.router.requests[0].request_id
    for odd in ("a b", "x" * 129, "é".encode(), ""):
        drawn = (await http.get("/version", headers={"X-Request-Id": odd})).headers["x-request-id"]
        assert len(drawn) == 32


async def test_the_callers_trace_is_continued_without_its_baggage(
    site: Site, http: httpx.AsyncClient
) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    for stream in (False, True):
        await http.post(
            "/v1/completions",
            json={"prompt": "abc", "max_tokens": 1, "stream": stream},
            headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "baggage": "user=secret"},
        )
    for metadata in site.router.metadata:
        assert metadata["traceparent"].split("-")[1] == trace_id
        assert "baggage" not in metadata


async def test_logs_say_what_happened_and_hold_no_content(
    site: Site, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await http.post("/v1/completions", json={"prompt": MARKER, "max_tokens": 2})
    await http.post("/v1/completions", json={"prompt": [MARKER, 1]})
    await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [MARKER]}]})
    site.router.error, site.router.error_after = RuntimeError("boom"), 1
    await http.post("/v1/completions", json={"prompt": MARKER, "max_tokens": 2, "stream": True})
    fields = [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
    posts = [
        {k: it.get(k) for k in ("path", "status", "completion_tokens", "error")}
        for it in fields
        if it["method"] == "POST"
    ]
    assert posts == [
        {"path": "/v1/completions", "status": 200, "completion_tokens": 2, "error": None},
        {"path": "/v1/completions", "status": 400, "completion_tokens": None, "error": "invalid_argument"},
        {"path": "/v1/chat/completions", "status": 400, "completion_tokens": None, "error": "invalid_argument"},
        {"path": "/v1/completions", "status": 200, "completion_tokens": 1, "error": "internal"},
    ]  # fmt: skip
    assert MARKER not in caplog.text
    assert not any(
        MARKER in str(vars(record)) for record in caplog.records if record.name.startswith("gateway")
    )


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
        while site.router.num_running < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await asyncio.wait_for(site.router.cancelled.wait(), 5)
    while site.router.num_running:
        await asyncio.sleep(0.01)
    assert site.router.num_cancelled == 2
    await asyncio.sleep(0.05)
    statuses = [
        r.fields["status"] for r in caplog.records if r.message == "request" and r.fields["method"] == "POST"
    ]  # type: ignore[attr-defined]
    assert statuses == [499]


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
    async with running(FakeRouter(), serving=False) as link, gateway_for(link.address) as (_, address):
        async with httpx.AsyncClient(base_url=f"http://{address}") as http:
            await until_status(http, "/ready", 503)
            await link.set_serving(True)
            await until_status(http, "/ready", 200)
            await link.set_serving(False)
            await until_status(http, "/ready", 503)


async def test_a_router_that_comes_back_elsewhere_is_found() -> None:
    addresses: list[str] = []

    async def resolve_router() -> str:
        return addresses[-1]

    gateway = GatewayServer(GatewayConfig("127.0.0.1", 0, GatewaySettings()), resolve_router)
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


async def test_the_death_of_the_router_in_mid_stream_is_said(site: Site, http: httpx.AsyncClient) -> None:
    site.router.silent_after = 1
    task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "ab", "stream": True}))
    while not site.router.num_running:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    await site.link.kill()
    chunks = events((await task).text)
    assert chunks[0]["choices"][0]["text"] == "a"
    assert chunks[-1]["error"]["code"] == "router_unreachable"


# Start and stop


async def test_a_port_in_use_is_an_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = GatewayConfig("127.0.0.1", taken.getsockname()[1], GatewaySettings())

        async def resolve_router() -> str:
            return "127.0.0.1:1"

        with pytest.raises(errors.InvalidArgument, match="in use") as caught:
            await GatewayServer(config, resolve_router).start()
    assert (caught.value.field, caught.value.reason) == ("port", "PORT_IN_USE")


async def test_a_stop_lets_running_answers_end(site: Site, http: httpx.AsyncClient) -> None:
    site.router.pace_s = 0.05
    task = asyncio.create_task(
        http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 6, "stream": True})
    )
    while not site.router.num_running:
        await asyncio.sleep(0.01)
    await site.gateway.stop(5)
    chunks = events((await task).text)
    assert chunks[-1] == "[DONE]" and len(chunks) == 7
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(base_url=site.url) as late:
            await late.get("/version")


async def test_what_outlives_the_drain_ends_with_an_error(site: Site, http: httpx.AsyncClient) -> None:
    site.router.silent_after = 1
    streaming = asyncio.create_task(http.post("/v1/completions", json={"prompt": "ab", "stream": True}))
    waiting = asyncio.create_task(http.post("/v1/completions", json={"prompt": "ab"}))
    while site.router.num_running < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    started = time.monotonic()
    await site.gateway.stop(0.1)
    assert time.monotonic() - started < 2
    assert events((await streaming).text)[-1]["error"]["code"] == "stopping"
    assert (await waiting).status_code == 503


async def test_the_process_starts_by_hand_serves_and_ends_on_sigterm() -> None:
    async with running(FakeRouter()) as link:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "--router", link.address, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 30)  # type: ignore[union-attr]
            address = line.split()[1].removeprefix("http=")
            async with httpx.AsyncClient(base_url=f"http://{address}") as http:
                await until_status(http, "/ready", 200)
                reply = await http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
            assert reply.json()["choices"][0]["text"] == "ab"
            process.send_signal(signal.SIGTERM)
            _, logs = await asyncio.to_thread(process.communicate, timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    lines = [json.loads(it) for it in logs.splitlines()]
    assert any(it["message"] == "request" and it["status"] == 200 for it in lines)


def test_a_bad_start_by_hand_says_why_without_a_stack() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "gateway",
                "--router",
                "127.0.0.1:1",
                "--port",
                str(taken.getsockname()[1]),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.returncode == 2
    assert "in use" in result.stderr and "Traceback" not in result.stderr


async def test_openai_without_asyncio_works_too(site: Site) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            stream = client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "x"}], max_tokens=4, stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == "<use"


async def test_fifty_streams_at_once_each_get_their_own_text(client: openai.AsyncOpenAI) -> None:
    async def ask(i: int) -> str:
        stream = await client.completions.create(model="fake", prompt=f"{i}.", max_tokens=i + 1, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    texts = await asyncio.gather(*(ask(i) for i in range(50)))
    assert texts == [(f"{i}." * 51)[: i + 1] for i in range(50)]
