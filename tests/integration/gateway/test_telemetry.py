"""Request ids, traces and logs: enough to follow a request, nothing of what it said."""

from __future__ import annotations

import logging

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.gateway_site import Site, request_lines

from moesaic import telemetry

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARKER = "xyzzymarkerxyzzy"


async def test_request_ids_are_echoed_and_reach_the_router(site: Site, http: httpx.AsyncClient) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 1}
    response = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "job-7.A_z"})
    assert response.headers["x-request-id"] == "job-7.A_z"
    assert response.json()["id"] == "cmpl-job-7.A_z"
    assert {request.request_id for request in site.router.requests} == {"job-7.A_z-0", "job-7.A_z-1"}
    assert site.router.metadata[0]["x-request-id"] == site.router.requests[0].request_id
    for odd in (b"a b", b"x" * 129, "é".encode(), b""):
        drawn = (await http.get("/version", headers={b"X-Request-Id": odd})).headers["x-request-id"]
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


async def test_a_request_is_one_span_with_its_counts_and_the_routers_below_it(
    site: Site, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(telemetry, "TRACER", provider.get_tracer("test"))
    for stream in (False, True):
        body = {"prompt": MARKER, "max_tokens": 2, "stream": stream}
        await http.post("/v1/completions", json=body, headers={"x-request-id": "r-1"})
    requests = [span for span in spans.get_finished_spans() if span.name == "POST /v1/completions"]
    calls = [span for span in spans.get_finished_spans() if span.name.endswith("InferenceService/Generate")]
    assert len(requests) == len(calls) == 2
    for request, call in zip(requests, calls, strict=True):
        assert call.parent is not None and call.parent.span_id == request.context.span_id
    attributes = dict(requests[0].attributes or {})
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "moesaic.request_id": "r-1",
        "gen_ai.request.model": "fake",
        "moe.epoch": "e1",
        "gen_ai.usage.input_tokens": len(MARKER),
        "gen_ai.usage.output_tokens": 2,
    }


async def test_logs_say_what_happened_and_hold_no_content(
    site: Site, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await http.post("/v1/completions", json={"prompt": MARKER, "max_tokens": 2})
    await http.post("/v1/completions", json={"prompt": [MARKER, 1]})
    await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [MARKER]}]})
    site.router.error, site.router.error_after = RuntimeError("boom"), 1
    await http.post("/v1/completions", json={"prompt": MARKER, "max_tokens": 2, "stream": True})
    shown = ("path", "status", "completion_tokens", "error")
    assert [{name: line.get(name) for name in shown} for line in request_lines(caplog)] == [
        {"path": "/v1/completions", "status": 200, "completion_tokens": 2, "error": None},
        {"path": "/v1/completions", "status": 400, "completion_tokens": None, "error": "invalid_argument"},
        {"path": "/v1/chat/completions", "status": 400, "completion_tokens": None, "error": "invalid_argument"},
        {"path": "/v1/completions", "status": 200, "completion_tokens": 1, "error": "internal"},
    ]  # fmt: skip
    assert MARKER not in caplog.text
    assert not any(
        MARKER in str(vars(record)) for record in caplog.records if record.name.startswith("gateway")
    )
