"""An incremental detokenizer: token ids to text, one at a time.

It is exact: the pieces join to the text of all tokens together, wherever tokens split characters.
(DecodeStream of the `tokenizers` library drops an unfinished character at the end and fails on bytes that
form no character, both of which a model may produce.)
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

# A character has at most four bytes, so the start of an unfinished one is spread over at most three tokens.
_MAX_UNFINISHED_TOKENS = 3


class Detokenizer:
    """The text with which one sequence continues its prompt.

    A character that is split over tokens is returned with its last byte; bytes that form no character become
    U+FFFD. With `drop_leading_space` the first space is left out when the prompt has no text of its own.
    """

    def __init__(
        self, bytes_of: Callable[[int], bytes], prompt: Sequence[int], *, drop_leading_space: bool
    ) -> None:
        self._bytes_of = bytes_of
        self._drop_leading_space = drop_leading_space and not any(map(bytes_of, prompt))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The prompt may end inside a character, which then belongs to its continuation.
        self._decoder.decode(b"".join(map(bytes_of, prompt[-_MAX_UNFINISHED_TOKENS:])))

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        piece = self._bytes_of(token_id)
        if piece and self._drop_leading_space:
            self._drop_leading_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """The text of a character that is still unfinished at the end."""
        return self._decoder.decode(b"", final=True)
