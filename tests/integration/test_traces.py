"""One trace from the client through gateway and router to every expert worker, as a collector receives it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support.checkpoints import write_mixtral
from support.processes import running_gateway, running_router, running_workers

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN = "b7ad6b7169203331"
PROMPT = [90, 91, 92]


class Collector:
    """An OTLP/HTTP endpoint that keeps what it is sent: service name and span."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.paths.append(self.path)
                collector.take(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            )
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield made
    made.close()


def test_one_trace_leads_from_the_caller_to_every_worker(collector: Collector, tmp_path: Path) -> None:
    model = write_mixtral(tmp_path / "tiny")
    with (
        running_workers(model, ["0-1", "2-3"]) as workers,
        running_router(model, workers) as router,
        running_gateway(router) as gateway,
        httpx.Client(base_url=f"http://{gateway.address}", timeout=60) as http,
    ):
        deadline = time.monotonic() + 60.0
        while http.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = http.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": PROMPT * 4, "max_tokens": 3},
            headers={"traceparent": f"00-{TRACE_ID}-{CALLER_SPAN}-01", "x-request-id": "traced-1"},
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == "traced-1"

    ours = [(service, span) for service, span in collector.spans if span.trace_id.hex() == TRACE_ID]
    by_id = {span.span_id.hex(): (service, span) for service, span in ours}

    computed = [span for _, span in ours if span.name == "moe.compute"]
    assert {attribute(span, "moe.worker") for span in computed} == {"worker-0", "worker-1"}
    for span in computed:
        path = []
        while (parent := by_id.get(span.parent_span_id.hex())) is not None:
            path.append(parent[0])
            span = parent[1]
        assert span.parent_span_id.hex() == CALLER_SPAN, "every span hangs on the caller's"
        assert path[0] == "router" and path[-1] == "gateway", path
    assert len({service for service, _ in ours}) == 4, "gateway, router and both workers"


def attribute(span: Span, key: str) -> str:
    return next(a.value.string_value for a in span.attributes if a.key == key)


def test_an_endpoint_that_is_not_in_the_environment_gets_the_spans(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    program = (
        "import sys; from moesaic import telemetry; "
        "telemetry.configure('a service', otlp_endpoint=sys.argv[1]); "
        "telemetry.TRACER.start_span('a span').end(); telemetry.flush()"
    )
    subprocess.run([sys.executable, "-c", program, collector.url + "/"], check=True, timeout=240)
    assert [(service, span.name) for service, span in collector.spans] == [("a service", "a span")]
    assert collector.paths == ["/v1/traces"]
