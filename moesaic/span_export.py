"""Takes spans to a collector that may be slow, silent or gone: nothing ever waits for it, and lost spans are counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

# Ended spans that wait for the collector, the batch that is under way included.
MAX_WAITING = 2048


class SpanExport(SpanProcessor):
    """A bounded queue before a thread that exports. A span that finds the queue full is dropped."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._lock = threading.Lock()
        self._waiting = 0
        self._dropped = 0
        self._failing = False
        self._batches = BatchSpanProcessor(_Delivery(exporter, self), max_queue_size=MAX_WAITING)

    @property
    def dropped(self) -> int:
        """The spans so far that no collector took."""
        return self._dropped

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self._batches.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        """Returns at once, whatever the collector does."""
        if not (span.context and span.context.trace_flags.sampled):
            return
        with self._lock:
            full = self._waiting >= MAX_WAITING
            self._dropped += full
            self._waiting += not full
        if not full:
            self._batches.on_end(span)

    def shutdown(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Exports what waits, and returns after `timeout_millis` at the latest: whether all was exported.

        The SDK's own does not heed the time, and a silent collector would hold it for most of a minute.
        """
        flushing = threading.Thread(target=self._batches.force_flush, daemon=True)
        flushing.start()
        flushing.join(timeout_millis / 1000)
        return not flushing.is_alive()

    def settle(self, num_spans: int, *, delivered: bool) -> None:
        """Counts a batch that was exported or lost, and logs when that changes."""
        with self._lock:
            self._waiting -= num_spans
            self._dropped += 0 if delivered else num_spans
        fields = {"fields": {"dropped": self._dropped}}
        if not delivered and not self._failing:
            log.warning("the collector takes no spans: they are dropped", extra=fields)
        if delivered and self._failing:
            log.warning("the collector takes spans again", extra=fields)
        self._failing = not delivered


class _Delivery(SpanExporter):
    """Tells the queue what became of each batch."""

    def __init__(self, exporter: SpanExporter, queue: SpanExport) -> None:
        self._exporter = exporter
        self._queue = queue

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        delivered = False
        try:
            result = self._exporter.export(spans)
            delivered = result is SpanExportResult.SUCCESS
        finally:
            self._queue.settle(len(spans), delivered=delivered)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
