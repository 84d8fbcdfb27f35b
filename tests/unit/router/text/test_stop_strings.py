"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from router.text.stop_strings import StopMatcher


def searched(
    stops: Sequence[str], pieces: Sequence[str], *, include_stop: bool = False
) -> tuple[str, str | None]:
    """All text that comes out, and the stop string that ended it."""
    matcher = StopMatcher(stops, include_stop=include_stop)
    out = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + matcher.flush(), None


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\nQ:"], include_stop=False)
    assert matcher.push("a\n") == ("a", None)
    assert matcher.push("\n") == ("", None)
    assert matcher.push("b") == ("\n\nb", None)
    assert matcher.push("\n\nQ") == ("", None)
    assert matcher.push(": what") == ("", "\n\nQ:")


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopMatcher([], include_stop=False)
    assert matcher.push("abc") == ("abc", None)
    assert matcher.flush() == ""


def test_the_stop_string_can_be_kept() -> None:
    assert searched(["stop"], ["please st", "op now"]) == ("please ", "stop")
    assert searched(["stop"], ["please st", "op now"], include_stop=True) == ("please stop", "stop")


def test_the_match_that_ends_first_wins_and_then_the_longest() -> None:
    assert searched(["bc", "abcd"], ["abcd"]) == ("a", "bc")
    assert searched(["c", "abc", "bc"], ["xabc"]) == ("x", "abc")
    assert searched(["aab"], ["aaab"]) == ("a", "aab")


def test_held_text_comes_out_when_no_stop_string_follows() -> None:
    assert searched(["end."], ["the en", "d"]) == ("the end", None)


def reference_search(stops: Sequence[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_the_search_does_not_depend_on_where_the_pieces_are_cut(stops: list[str], pieces: list[str]) -> None:
    assert searched(stops, pieces) == reference_search(stops, "".join(pieces))
