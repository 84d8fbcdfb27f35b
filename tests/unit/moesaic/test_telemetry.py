"""Log lines: one line for a person on a terminal, JSON elsewhere."""

from __future__ import annotations

import json
import logging
import sys

from moesaic.telemetry import JsonFormatter, PlainFormatter


def record(message: str, error: Exception | None = None, **fields: object) -> logging.LogRecord:
    info = (type(error), error, None) if error is not None else None
    made = logging.LogRecord("cluster.control", logging.WARNING, __file__, 1, message, (), info)
    made.fields = fields
    return made


def test_a_person_reads_one_line_without_braces() -> None:
    lost = record("process lost", process="gateway", reason="its process died")
    assert PlainFormatter("controller").format(lost) == (
        "controller: process lost (process gateway, reason its process died)"
    )
    assert PlainFormatter("router-0").format(record("hello")) == "router-0: hello"


def test_an_exception_is_its_last_line_for_a_person_and_whole_in_json() -> None:
    try:
        raise ValueError("no\nway")
    except ValueError:
        made = record("cannot start", None)
        made.exc_info = sys.exc_info()
    assert PlainFormatter("router-0").format(made) == "router-0: cannot start: ValueError: no way"
    assert "Traceback" in json.loads(JsonFormatter("router-0").format(made))["exception"]


def test_a_program_reads_json() -> None:
    line = json.loads(JsonFormatter("controller").format(record("process lost", process="gateway")))
    assert (line["service"], line["level"], line["process"]) == ("controller", "warning", "gateway")
