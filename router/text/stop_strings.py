"""Finds stop strings in text that grows token by token, wherever it is cut into pieces."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back what may be the start of one.

    The first match is the one that ends first, and the longest of those that end together.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        # Sorted, so that one look tells whether any begins with a given text.
        self._stops = sorted(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """The text that is certain by now, and the stop string that ends it, after which none may follow."""
        text = self._held + piece
        match = self._first_match(text)
        if match is not None:
            start, stop = match
            self._held = ""
            return text[: start + len(stop) if self._include_stop else start], stop
        self._held = self._possible_start(text)
        return text[: len(text) - len(self._held)], None

    def flush(self) -> str:
        """The text that was held back, for a text that ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _possible_start(self, text: str) -> str:
        """The longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for start in range(max(len(text) - longest, 0), len(text)):
            end = text[start:]
            place = bisect_left(self._stops, end)
            if place < len(self._stops) and self._stops[place].startswith(end):
                return end
        return ""
