"""Text that arrives in pieces, with lines broken between words at the width of the terminal."""

from __future__ import annotations

from rich.console import Console


class WordFlow:
    """Writes to a console. A word is held back until its end has arrived."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._file = out.file
        self._width = out.width
        self._column = 0
        self._word = ""

    def write(self, piece: str) -> None:
        for character in piece:
            if not character.isspace():
                self._word += character
                continue
            self._end_word()
            self._put(character)
        self._file.flush()

    def note(self, line: str) -> None:
        """Prints a line of markup between the words that have ended."""
        if self._column:
            self._put("\n")
        self._out.print(line)

    def end(self) -> None:
        self._end_word()
        self._file.write("\n")
        self._file.flush()

    def _end_word(self) -> None:
        if self._column + len(self._word) > self._width and self._column:
            self._put("\n")
        self._put(self._word)
        self._word = ""

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._column = 0 if text == "\n" else self._column + len(text)
