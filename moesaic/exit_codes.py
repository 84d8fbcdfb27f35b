"""How a command ends: 0 done, 1 failed, 2 bad input; one line on stderr says what was wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moesaic.errors import MoesaicError
from moesaic.stop_signals import StopRequested

# Names the origin of a field's value, as in `--workers 0`; None where it is not known.
Spell = Callable[[str], str | None]


@contextmanager
def exit_with_code(*, as_json: bool = False, spell: Spell | None = None) -> Iterator[None]:
    """Turns an error into its line and its code. A stop that was requested is no error.

    `spell` puts what was typed in place of the field at fault: `--workers 0` for `workers`.
    """
    try:
        yield
    except MoesaicError as error:
        print(_line(error, _message(error, spell), as_json=as_json), file=sys.stderr)
        sys.exit(_code(error))
    except StopRequested:
        print("stopped", file=sys.stderr)


def _code(error: MoesaicError) -> int:
    """2 for an error that names what the caller can mend."""
    return 1 if error.field is None else 2


def _message(error: MoesaicError, spell: Spell | None) -> str:
    start = f"{error.field}: "
    if spell is None or error.field is None or not error.message.startswith(start):
        return error.message
    words = spell(error.field)
    return error.message if words is None else f"{words}: {error.message.removeprefix(start)}"


def _line(error: MoesaicError, message: str, *, as_json: bool) -> str:
    if not as_json:
        return f"error: {' '.join(message.split())}"
    details = {"message": message, "reason": error.reason, "field": error.field}
    return json.dumps({"error": details})
