"""A collector that is slow, silent or gone delays nothing, and the spans that it does not take are counted."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from moesaic.span_export import MAX_WAITING, SpanExport

TIMEOUT_S = 10.0


class GatedExporter(SpanExporter):
    """Takes no batch before the gate opens."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.gate = threading.Event()
        self.result = result
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        assert self.gate.wait(TIMEOUT_S)
        self.taken += len(spans)
        return self.result


def end_spans(export: SpanExport, num_spans: int) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export)
    tracer = provider.get_tracer("test")
    for _ in range(num_spans):
        tracer.start_span("moe.compute").end()


def test_a_socket_that_never_answers_delays_neither_a_span_nor_the_end(silent_address: str) -> None:
    # The exporter would wait for an hour: what returns has not waited for it.
    exporter = OTLPSpanExporter(endpoint=f"http://{silent_address}/v1/traces", timeout=3600.0)
    export = SpanExport(exporter)
    end_spans(export, 3 * MAX_WAITING)
    assert export.dropped == 2 * MAX_WAITING
    assert not export.force_flush(timeout_millis=50)
    # Its thread would try again for an hour, and draw random numbers beside the tests that follow.
    exporter.shutdown()


def test_a_queue_that_is_full_drops_what_comes_and_delivers_what_waits() -> None:
    exporter = GatedExporter()
    export = SpanExport(exporter)
    end_spans(export, MAX_WAITING + 7)
    exporter.gate.set()
    assert export.force_flush(timeout_millis=int(TIMEOUT_S * 1000))
    assert (exporter.taken, export.dropped) == (MAX_WAITING, 7)
    end_spans(export, 5)
    assert export.force_flush(timeout_millis=int(TIMEOUT_S * 1000))
    assert (exporter.taken, export.dropped) == (MAX_WAITING + 5, 7)


def test_spans_that_a_collector_refuses_are_counted() -> None:
    exporter = GatedExporter(SpanExportResult.FAILURE)
    exporter.gate.set()
    export = SpanExport(exporter)
    end_spans(export, 3)
    assert export.force_flush(timeout_millis=int(TIMEOUT_S * 1000))
    assert export.dropped == 3
