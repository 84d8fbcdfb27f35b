"""How a verb ends: 0 done, 1 failed, 2 bad input; one line on stderr says what was wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from cluster.launch.stop_signals import StopRequested
from moesaic.errors import MoesaicError


@contextmanager
def exit_with_code(*, as_json: bool) -> Iterator[None]:
    """Turns an error into its line and its code. A stop that somebody asked for is no error."""
    try:
        yield
    except MoesaicError as error:
        print(_line(error, as_json=as_json), file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except StopRequested:
        print("stopped", file=sys.stderr)


def _line(error: MoesaicError, *, as_json: bool) -> str:
    if not as_json:
        return f"error: {' '.join(error.message.split())}"
    details = {"message": error.message, "reason": error.reason, "field": error.field}
    return json.dumps({"error": details})
