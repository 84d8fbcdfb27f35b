"""Every error reaches the client with a status, an envelope and no internals, and the gateway lives on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from support.fake_router import FakeRouter, running
from support.gateway_site import Site, events, gateway_for, until_status

from gateway.edge import MAX_ACTIVE
from moesaic import errors, rpc
from moesaic.settings import GatewaySettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARKER = "xyzzymarkerxyzzy"


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
        ({"extra_body": {"experts": {"deny": ["a", ""]}}}, "experts.deny[1]", "invalid_argument"),
        ({"extra_body": {"experts": {"deny": ["12:7", "12:"]}}}, "experts.deny[1]", "invalid_argument"),
        ({"extra_body": {"experts": {"deny": ["a"] * 257}}}, "experts.deny", "invalid_argument"),
        ({"extra_body": {"experts": {"allow": ["x" * 257]}}}, "experts.allow[0]", "invalid_argument"),
        ({"extra_body": {"experts": {"deny": "maths-v1"}}}, "experts.deny", "invalid_argument"),
        ({"extra_body": {"experts": {"deny": [7]}}}, "experts.deny[0]", "invalid_argument"),
        ({"extra_body": {"experts": {"top_k": 0}}}, "experts.top_k", "invalid_argument"),
        ({"extra_body": {"experts": {"top_k": True}}}, "experts.top_k", "invalid_argument"),
        ({"extra_body": {"experts": {"on_missing": "hope"}}}, "experts.on_missing", "invalid_argument"),
        ({"extra_body": {"experts": {"denied": []}}}, "experts.denied", "invalid_argument"),
        ({"extra_body": {"experts": ["maths-v1"]}}, "experts", "invalid_argument"),
        ({"extra_body": {"return_weight_versions": 1}}, "return_weight_versions", "invalid_argument"),
        ({"extra_body": {"session_id": "x" * 257}}, "session_id", "invalid_argument"),
        ({"extra_body": {"epoch": 7}}, "epoch", "invalid_argument"),
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


@pytest.mark.parametrize("field", ["experts", "return_weight_versions", "epoch", "session_id"])
@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/tokenize", {"prompt": "abc"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}),
        ("/detokenize", {"tokens": [97]}),
    ],
)
async def test_no_expert_computes_where_nothing_is_generated(
    http: httpx.AsyncClient, route: str, body: dict[str, Any], field: str
) -> None:
    response = await http.post(route, json={**body, field: None})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("experts.require", 400),
        ("experts", 400),
        ("epoch", 400),
        ("epoch.id", 400),
        ("digest", 500),
        (None, 500),
    ],
)
async def test_a_precondition_is_the_clients_where_the_request_states_it(
    site: Site, http: httpx.AsyncClient, field: str | None, status: int
) -> None:
    site.router.error = errors.FailedPrecondition(f"{field}: not so", field=field, reason="EXPERTS_MISSING")
    response = await http.post("/v1/completions", json={"prompt": "abc"})
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (field, "experts_missing")


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
    async with (
        running(FakeRouter(silent_after=0)) as link,
        gateway_for(link.address, settings=GatewaySettings(request_timeout_s=0.3)) as (_, address),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as http,
    ):
        await until_status(http, "/ready", 200)
        response = await http.post("/v1/completions", json={"prompt": "abc"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


async def test_a_body_that_does_not_arrive_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.app._BODY_TIMEOUT_S", 0.1)

    host, port = site.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    )
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 60)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"request_timeout"' in answer


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


async def test_an_answer_that_no_message_can_hold_is_not_tried_again(
    site: Site, http: httpx.AsyncClient
) -> None:
    """Whether the router says so or gRPC, which has the same status for it as for a full queue."""
    site.router.error = errors.InvalidArgument("too long", field="prompt", reason=errors.TOO_LARGE)
    said = await http.post("/v1/completions", json={"prompt": "a"})
    site.router.reset()
    site.router.max_model_len = 1
    site.router.model = "x" * (rpc.PUBLIC_MESSAGE_BYTES + 1)
    found = await http.get("/v1/models")
    for response in (said, found):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
        assert response.headers["x-should-retry"] == "false"
        assert "retry-after" not in response.headers


async def test_no_page_of_another_site_may_read_an_answer(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/models", headers={"origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in response.headers)
    preflight = await http.options("/v1/completions", headers={"origin": "http://evil.example"})
    assert preflight.status_code == 405


async def test_a_gateway_off_loopback_answers_to_any_name() -> None:
    async with gateway_for(None, host="0.0.0.0") as (_, address):
        port = address.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            response = await http.get("/version", headers={"host": "llm.example:80"})
    assert response.status_code == 200


async def test_one_request_too_many_is_refused_but_probes_are_not(
    site: Site, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = site.gateway._http.config.app
    monkeypatch.setattr(edge, "_num_active", MAX_ACTIVE)
    assert (await http.get("/v1/models")).status_code == 429
    assert (await http.get("/health")).status_code == 200


async def test_on_loopback_only_local_and_listed_names_are_answered(http: httpx.AsyncClient) -> None:
    refused = await http.get("/v1/models", headers={"host": "rebound.example"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "Host"
    settings = GatewaySettings(allowed_hosts=("models.example",))
    async with (
        gateway_for(None, settings=settings) as (_, address),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as named,
    ):
        for name in ("models.example", "localhost"):
            assert (await named.get("/version", headers={"host": name})).status_code == 200
