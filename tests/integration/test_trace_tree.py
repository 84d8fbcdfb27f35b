"""The example of docs/observability.md prints one request as a tree of spans."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PROGRAM = Path(__file__).resolve().parents[2] / "docs" / "examples" / "trace_tree.py"


def exported(service: str, name: str, span: str, parent: str = "", layer: int | None = None) -> bytes:
    """One span as its process would send it, 2 ms long, later than its parent."""
    request = ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    label = resource.resource.attributes.add(key="service.name")
    label.value.string_value = service
    made = resource.scope_spans.add().spans.add(
        name=name,
        span_id=span.encode(),
        parent_span_id=parent.encode(),
        start_time_unix_nano=len(parent) + 1,
        end_time_unix_nano=2_000_000 + len(parent) + 1,
    )
    if layer is not None:
        made.attributes.add(key="moe.layer").value.int_value = layer
    return request.SerializeToString()


def test_spans_of_several_processes_become_one_tree() -> None:
    process = subprocess.Popen([sys.executable, str(PROGRAM), "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1] + "/v1/traces"
        for body in (
            exported("worker", "moe.compute", "ccc", parent="bb", layer=3),
            exported("router", "moe.dispatch", "bb", parent="a", layer=3),
            exported("gateway", "POST /v1/completions", "a", parent=""),
            exported("gateway", "GET /ready", "z"),
        ):
            assert httpx.post(url, content=body, timeout=60.0).status_code == 200
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert printed.splitlines() == [
        "     2.00 ms  gateway: POST /v1/completions",
        "     2.00 ms    router: moe.dispatch layer 3",
        "     2.00 ms      worker: moe.compute layer 3",
    ]
