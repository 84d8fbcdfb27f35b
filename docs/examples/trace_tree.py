"""Receives OpenTelemetry spans over HTTP; Ctrl-C ends it and prints the requests as trees of spans.

Run: python docs/examples/trace_tree.py [PORT]
"""

from __future__ import annotations

import signal
import sys
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

spans: list[tuple[str, Span]] = []
ROOT = b""


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                spans.extend((names["service.name"], span) for span in scope.spans)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


def print_trees() -> None:
    known = {span.span_id for _, span in spans}
    children: defaultdict[bytes, list[tuple[str, Span]]] = defaultdict(list)
    for service, span in sorted(spans, key=lambda each: each[1].start_time_unix_nano):
        children[span.parent_span_id if span.parent_span_id in known else ROOT].append((service, span))

    def show(parent: bytes, depth: int) -> None:
        for service, span in children[parent]:
            if depth or span.span_id in children:  # A root without children is a health check or the like.
                layer = "".join(
                    f" layer {each.value.int_value}" for each in span.attributes if each.key == "moe.layer"
                )
                ms = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
                print(f"{ms:9.2f} ms  {'  ' * depth}{service}: {span.name}{layer}")
                show(span.span_id, depth + 1)

    show(ROOT, 0)


if __name__ == "__main__":
    # A shell lets the programs that it starts with & ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 4318
    with ThreadingHTTPServer(("127.0.0.1", port), Receiver) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_trees()
