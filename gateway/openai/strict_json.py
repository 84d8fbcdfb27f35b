"""A strict JSON parser: text that two parsers could read differently is refused.

Duplicate fields, lone surrogates, NUL, deep nesting and very large objects are errors that name the field.
The types of the fields refuse numbers that are not finite. The size of the body is bounded before parsing,
and with it the cost of every pass over it.
"""

from __future__ import annotations

import json
from typing import Any

from moesaic.errors import InvalidArgument

MAX_DEPTH = 32
# The most entries of one object, or of one list of lists or objects. Each could cost an error report.
MAX_FIELDS = 4096
_MAX_NAME = 64


def parse(body: bytes) -> Any:
    """The value of a request body. Raises InvalidArgument, which names the field where there is one."""
    value = _load(body)
    # Only containers can be nested, and only escapes can encode invalid text: most bodies need no check.
    if b"\\u" in body or body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        fields = value if isinstance(value, dict) else {}
        for name, field in fields.items():
            _check(name, readable(name), 1)
            _check(field, readable(name), 1)
    return value


def readable(name: str) -> str:
    """A name that a client sent, shortened and made printable for a message."""
    return name[:_MAX_NAME].encode("unicode_escape").decode("ascii")


def _load(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the body is not valid UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"the body is not valid JSON at character {error.pos}: {error.msg}") from error
    except RecursionError as error:
        raise InvalidArgument(f"the body is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidArgument("the body holds an integer that is too long") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_FIELDS:
        raise InvalidArgument(f"an object may have at most {MAX_FIELDS} fields")
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise InvalidArgument(f"duplicate field {readable(name)}", field=readable(name))
        fields[name] = value
    return fields


def _check(value: Any, field: str, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise InvalidArgument(f"{field}: the text holds NUL or half of a surrogate pair", field=field)
    elif isinstance(value, list | dict):
        if depth >= MAX_DEPTH:
            raise InvalidArgument(f"{field} is nested deeper than {MAX_DEPTH} levels", field=field)
        if len(value) > MAX_FIELDS and isinstance(value, list) and isinstance(value[0], list | dict):
            raise InvalidArgument(f"{field} has more than {MAX_FIELDS} entries", field=field)
        for child in [*value, *value.values()] if isinstance(value, dict) else value:
            _check(child, field, depth + 1)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
