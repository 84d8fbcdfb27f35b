"""The tokenizer of a model folder in any format: text to token ids, and the names of its special tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer


class TokenizerParts(NamedTuple):
    """The content of a tokenizer file; see TextTokenizer."""

    backend: Tokenizer
    special_names: Mapping[str, str]
    begins_with_space: bool


class TextTokenizer:
    """A tokenizer, immutable and thread-safe. `special_names`: tokens by role, such as bos_token.

    `begins_with_space`: whether a text gets a space in front, as in SentencePiece, unless it begins with a
    special token. (The library's own normalizer adds none to a text that begins with a space already.)
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_names: Mapping[str, Any] | None = None,
        *,
        begins_with_space: bool = False,
    ) -> None:
        self.backend = backend
        self.special_names = dict(special_names or {})
        self.begins_with_space = begins_with_space
        added = backend.get_added_tokens_decoder().values()
        special = "|".join(re.escape(token.content) for token in added if token.special)
        self._begins_with_special = re.compile(special or r"(?!)")
        # A folder may ask for both, but a server must neither cut nor pad a prompt.
        backend.no_truncation()
        backend.no_padding()

    @property
    def eos_token_id(self) -> int | None:
        name = self.special_names.get("eos_token")
        return None if name is None else self.backend.token_to_id(str(name))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The token ids of a text. Takes time in proportion to its length."""
        if self.begins_with_space and text and not self._begins_with_special.match(text):
            text = " " + text
        # Of all the library's ways this one alone lets other threads run meanwhile.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)
