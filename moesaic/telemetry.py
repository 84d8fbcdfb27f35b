"""Traces and logs: the names of spans and attributes, W3C context in gRPC metadata, lines on stderr.

Without `configure`, or without an OTLP endpoint, spans are no-ops. Neither a span nor a log line ever holds a
prompt, a token id, or the expert that computed a token, which would reveal the prompt.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping

from opentelemetry import propagate, trace
from opentelemetry.context import Context

TRACER = trace.get_tracer("moesaic")

# The names of spans and attributes follow the GenAI conventions where these exist; the project's own begin
# with `moe.`.
SPAN_DISPATCH = "moe.dispatch"
SPAN_COMPUTE = "moe.compute"
REQUEST_ID = "moesaic.request_id"
MODEL = "gen_ai.request.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
EPOCH = "moe.epoch"
LAYER = "moe.layer"
ROWS = "moe.rows"
WORKER = "moe.worker"
DEGRADED = "moe.degraded_assignments"

FLUSH_TIMEOUT_MS = 2000

REQUEST_ID_METADATA = "x-request-id"
# The standard variable with the address of a collector.
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def inject() -> list[tuple[str, str]]:
    """The current span's context as gRPC metadata; empty without a span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return list(carrier.items())


def extract(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """The caller's context from gRPC metadata."""
    return propagate.extract({key: value for key, value in metadata or () if isinstance(value, str)})


def current_traceparent() -> str:
    """The current span's W3C `traceparent`, for messages of a stream; empty when nothing is recorded."""
    if not trace.get_current_span().is_recording():
        return ""
    return dict(inject()).get("traceparent", "")


def choose_log_level(wanted: str | None) -> str:
    """The wanted level, or else WARNING on a terminal and INFO elsewhere."""
    return wanted or ("WARNING" if sys.stderr.isatty() else "INFO")


def configure(
    service: str,
    *,
    otlp_endpoint: str | None,
    log_level: str | None = None,
    for_people: bool | None = None,
) -> None:
    """Sets up logs, and an OTLP exporter where there is an endpoint.

    Called once, at the start of a process. The lines are for people or in JSON; None: for people where stderr
    is a terminal.
    """
    handler = logging.StreamHandler(sys.stderr)
    plain = sys.stderr.isatty() if for_people is None else for_people
    handler.setFormatter(PlainFormatter(service) if plain else JsonFormatter(service))
    logging.basicConfig(level=choose_log_level(log_level), handlers=[handler], force=True)
    if otlp_endpoint:
        _configure_tracing(service, otlp_endpoint)


def flush() -> None:
    """Exports the spans that are still buffered, for 2 s at most. Called before a process ends."""
    force_flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if force_flush is not None:
        force_flush(timeout_millis=FLUSH_TIMEOUT_MS)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts, level, service, logger, message, and `extra={"fields": …}`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PlainFormatter(logging.Formatter):
    """One line for a person: service, message, the fields in brackets, and the last line of an exception."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self._service}: {record.getMessage()}"
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping) and fields:
            line += f" ({', '.join(f'{name} {value}' for name, value in fields.items())})"
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line += f": {type(error).__name__}: {error}"
        return " ".join(line.split())


def _configure_tracing(service: str, endpoint: str) -> None:
    # The SDK comes with moesaic-server. A client process never reaches this.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    from moesaic.span_export import SpanExport

    # `flush` is what a process waits for at its end; the SDK's own end could take half a minute.
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    # The exporter finds the address in the environment, which lacks one that comes from a settings file, and
    # on another node any.
    os.environ[ENDPOINT] = endpoint
    provider.add_span_processor(SpanExport(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
