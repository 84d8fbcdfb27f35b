"""Keeps messages from injecting control tokens, which only the chat template may write.

A template mixes its own text with that of the messages. What a message spells like a control token is
enclosed in two marks before the template runs, and what is enclosed afterwards is tokenized as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from moesaic.errors import InvalidArgument
from router.text.tokenizer import TextTokenizer

# Noncharacters of Unicode, which texts are not allowed to contain and no tokenizer's normalizer changes.
_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"


class ControlTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.backend.model
        self._added: Mapping[int, AddedToken] = tokenizer.backend.get_added_tokens_decoder()
        self._ids = {token.content: token_id for token_id, token in self._added.items() if token.special}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._parts = re.compile(
            f"{_OPEN}({self._spelled.pattern}){_CLOSE}|({self._spelled.pattern})|[{_OPEN}{_CLOSE}]"
        )

    def mark(self, value: Any) -> Any:
        """A message, or a template variable's value, with marks around what is spelled like a control token.

        Raises InvalidArgument for text that contains the marks themselves.
        """
        if isinstance(value, str):
            if _OPEN in value or _CLOSE in value:
                raise InvalidArgument("messages: must not contain U+10FFFE or U+10FFFF", field="messages")
            return self._spelled.sub(f"{_OPEN}\\g<0>{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.mark(item) for item in value]
        return value

    def unmarked(self, rendered: str) -> str:
        """The text that a template rendered from marked messages, without the marks."""
        return rendered.replace(_OPEN, "").replace(_CLOSE, "")

    def encode(self, rendered: str) -> tuple[int, ...]:
        """The token ids of the text that a template rendered from marked messages.

        Raises InvalidArgument where the tokenizer cannot tell text from control tokens.
        """
        if _OPEN not in rendered and _CLOSE not in rendered:
            return self._tokenizer.encode(rendered, add_special_tokens=False)
        num_written = 0

        def written(part: re.Match[str]) -> str:
            nonlocal num_written
            if part[2] is None:
                return part[1] or ""  # text between marks, or a mark whose partner is cut off
            num_written += 1
            return _private(self._ids[part[2]])

        content = self._parts.sub(written, rendered)
        found = self._private_tokenizer.encode(content, add_special_tokens=False)
        num_read = sum(token_id in self._private_controls for token_id in found)
        if num_read != num_written or not self._never_text.isdisjoint(found):
            raise InvalidArgument(
                "messages: what spells a control token of this model cannot be told from it", field="messages"
            )
        return tuple(self._originals.get(token_id, token_id) for token_id in found)

    @cached_property
    def _private_tokenizer(self) -> TextTokenizer:
        """The same tokenizer with control tokens spelled in a way that no message can.

        It shares the original's model and so costs almost nothing. Its added tokens have ids of their own.
        """
        original = self._tokenizer.backend
        backend = Tokenizer(self._model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(original, part) is not None:
                setattr(backend, part, getattr(original, part))
        for token_id, token in sorted(self._added.items()):
            backend.add_tokens([_like(token, _spelling(token_id, token))])
        return TextTokenizer(backend, begins_with_space=self._tokenizer.begins_with_space)

    @cached_property
    def _originals(self) -> dict[int, int]:
        """Maps the ids of the private tokenizer's added tokens to those of the original."""
        private = {_spelling(token_id, token): token_id for token_id, token in self._added.items()}
        return {
            found: private[token.content]
            for found, token in self._private_tokenizer.backend.get_added_tokens_decoder().items()
        }

    @cached_property
    def _private_controls(self) -> frozenset[int]:
        added = self._private_tokenizer.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _never_text(self) -> frozenset[int]:
        """Control tokens in the model's own vocabulary; not the unknown one, which may stand for any text."""
        unknown = getattr(self._model, "unk_token", None)
        find = Tokenizer(self._model).token_to_id
        held = (find(content) for content in self._ids if content != unknown)
        return frozenset(token_id for token_id in held if token_id is not None) - self._private_controls


def _spelling(token_id: int, token: AddedToken) -> str:
    """The spelling of an added token in the private tokenizer."""
    return _private(token_id) if token.special else token.content


def _private(token_id: int) -> str:
    return f"{_OPEN}{token_id}{_CLOSE}"


def _like(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )
