"""Bodies that two readers could understand differently are refused, with the field's name, in bounded time."""

from __future__ import annotations

import contextlib
import gc
import time

import pytest

from gateway.openai import strict_json
from moesaic.errors import InvalidArgument


def test_ordinary_bodies_come_through() -> None:
    assert strict_json.parse('{"a": [1, 2.5, null, true], "b": {"é": "\\u00e9\\ud83d\\ude00"}}'.encode()) == {
        "a": [1, 2.5, None, True],
        "b": {"é": "é😀"},
    }


@pytest.mark.parametrize(
    ("body", "says", "field"),
    [
        (b"", "not valid JSON at character 0", None),
        (b'{"a": ', "not valid JSON at character 6", None),
        (b"\xff", "not valid UTF-8 at byte 0", None),
        (b'{"a": 1, "a": 2}', "duplicate field a", "a"),
        (b'{"x": {"a": 1, "a": 2}}', "duplicate field a", "a"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair", "prompt"),
        (b'{"prompt": ["a", "\\u0000"]}', "NUL", "prompt"),
        (b'{"\\udc00": 1}', "half of a surrogate pair", "\\udc00"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32", "a"),
        (b"[" * 100_000, "nested deeper than 32", None),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer that is too long", None),
        (b"{" + b",".join(b'"%d": 1' % i for i in range(5000)) + b"}", "at most 4096 fields", None),
    ],
)
def test_a_body_with_two_meanings_is_refused(body: bytes, says: str, field: str | None) -> None:
    with pytest.raises(InvalidArgument) as caught:
        strict_json.parse(body)
    assert says in caught.value.message
    assert caught.value.field == field


def test_the_limit_of_nesting_is_exact() -> None:
    deepest = b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}"
    strict_json.parse(deepest)
    with pytest.raises(InvalidArgument):
        strict_json.parse(b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}")


def test_a_list_of_lists_has_a_bound_and_a_list_of_numbers_has_none() -> None:
    strict_json.parse(b'{"a": [' + b",".join([b"1"] * 100_000) + b"]}")
    with pytest.raises(InvalidArgument, match="a has more than 4096 entries"):
        strict_json.parse(b'{"a": [' + b",".join([b"[1]"] * 5000) + b"]}")


def test_a_name_from_a_client_is_cut_and_printable_in_a_message() -> None:
    assert strict_json.readable("a\n\x1b[31m" + "x" * 500) == "a\\n\\x1b[31m" + "x" * 57


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b",".join(b"[1]" for _ in range(1_000_000)) + b"]}",
        b'{"prompt": "' + b"\\u00e9" * 1_300_000 + b'"}',
        b'{"a":' * 500_000,
    ],
    ids=["many lists", "many escapes", "deep objects"],
)
def test_the_largest_bodies_cost_no_more_than_a_moment(body: bytes) -> None:
    # The garbage collector would go through everything that other tests left in memory, again and again.
    gc.freeze()
    try:
        started = time.process_time()
        with contextlib.suppress(InvalidArgument):
            strict_json.parse(body)
        assert time.process_time() - started < 2.0
    finally:
        gc.unfreeze()
