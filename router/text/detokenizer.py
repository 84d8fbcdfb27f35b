"""Token ids to text as they come: an incremental detokenizer, and the search for stop strings.

Both are exact: the pieces join to the text of all tokens together, wherever tokens and characters are cut, and a stop
string is found at the same place whatever the pieces. (The library's DecodeStream drops an unfinished character at the
end and fails on bytes that are no character, both of which a model may produce.)
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

# A character has at most four bytes, so at most three tokens hold the start of an unfinished one.
_MAX_UNFINISHED_TOKENS = 3


class Detokenizer:
    """The text of one sequence, as it continues its prompt.

    A character that is split over tokens comes with its last byte; bytes that are no character come as U+FFFD.
    With `drop_leading_space` the first space is left out when the prompt has no text of its own.
    """

    def __init__(
        self, bytes_of: Callable[[int], bytes], prompt: Sequence[int], *, drop_leading_space: bool
    ) -> None:
        self._bytes_of = bytes_of
        self._drop_leading_space = drop_leading_space and not any(map(bytes_of, prompt))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The prompt may end inside a character, which then belongs to what follows.
        self._decoder.decode(b"".join(map(bytes_of, prompt[-_MAX_UNFINISHED_TOKENS:])))

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        piece = self._bytes_of(token_id)
        if piece and self._drop_leading_space:
            self._drop_leading_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left of an unfinished character at the end."""
        return self._decoder.decode(b"", final=True)
