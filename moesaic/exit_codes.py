"""How a command ends: 0 done, 1 failed, 2 bad input; one line on stderr says what was wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from moesaic.errors import MoesaicError
from moesaic.stop_signals import StopRequested


@contextmanager
def exit_with_code(*, as_json: bool = False) -> Iterator[None]:
    """Turns an error into its line and its code. A stop that was requested is no error."""
    try:
        yield
    except MoesaicError as error:
        print(_line(error, as_json=as_json), file=sys.stderr)
        sys.exit(_code(error))
    except StopRequested:
        print("stopped", file=sys.stderr)


def _code(error: MoesaicError) -> int:
    """2 for an error that names what the caller can mend."""
    return 1 if error.field is None else 2


def _line(error: MoesaicError, *, as_json: bool) -> str:
    if not as_json:
        return f"error: {' '.join(error.message.split())}"
    details = {"message": error.message, "reason": error.reason, "field": error.field}
    return json.dumps({"error": details})
