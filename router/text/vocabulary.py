"""A tokenizer's vocabulary: which bytes each token spells.

A token stands for a string of bytes, and text is the bytes of all tokens read as UTF-8. That makes log
probabilities exact (a token may hold half a character) and streaming exact (see detokenizer.py). The decoder
of a tokenizer states how its vocabulary writes bytes. Both ways in use, byte-level alphabets and
SentencePiece pieces, are supported; any other is refused at loading.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from moesaic.errors import CheckpointError

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[int, str]:
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


# The character by which a byte-level vocabulary writes each byte, as GPT-2 chose them: itself where it is
# printable in Latin-1 and no space, else one behind Latin-1.
BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF_CHARACTER = {character: byte for byte, character in BYTE_ALPHABET.items()}


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a vocabulary writes bytes.

    With `byte_level` every byte is a character of an alphabet of 256. Otherwise tokens are pieces of text in
    which `space_marks` stand for spaces, and with `byte_fallback` tokens such as <0xE2> stand for single
    bytes. With `adds_leading_space` the first space of a text is the tokenizer's and not part of it.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    space_marks: tuple[str, ...] = ()
    adds_leading_space: bool = False

    def to_bytes(self, token: str) -> bytes:
        """The bytes of an ordinary token."""
        if self.byte_level:
            return _byte_level_bytes(token)
        if self.byte_fallback and (byte := _BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for mark in self.space_marks:
            token = token.replace(mark, " ")
        return token.encode()


class Vocabulary:
    """The tokens of one tokenizer by id. Other ids spell nothing, as embeddings are often padded."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._spelling = _spelling_of(backend)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    @property
    def adds_leading_space(self) -> bool:
        return self._spelling.adds_leading_space

    def token(self, token_id: int) -> str:
        """A token in the vocabulary's own spelling, empty for an id that it does not hold."""
        return self._backend.id_to_token(token_id) or ""

    def bytes_of(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelled(token_id)
        return known

    def visible_bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token, none for a special token."""
        return b"" if token_id in self._special else self.bytes_of(token_id)

    def _spelled(self, token_id: int) -> bytes:
        if token_id in self._added:  # added tokens are literal text, however the others are written
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spelling.to_bytes(token)


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:  # a character outside the alphabet: the token is literal text
        return token.encode()


def _spelling_of(backend: Tokenizer) -> Spelling:
    """How a vocabulary writes bytes. Raises CheckpointError if the decoder has an unknown step."""
    steps = _decoder_steps(backend)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return Spelling(byte_level=True)
    metaspaces = [step for step in steps if step["type"] == "Metaspace"]
    replaced = [step["pattern"]["String"] for step in steps if step["type"] == "Replace"]
    return Spelling(
        byte_fallback="ByteFallback" in kinds,
        space_marks=(*replaced, *(step["replacement"] for step in metaspaces)),
        adds_leading_space="Strip" in kinds or any(step["prepend_scheme"] != "never" for step in metaspaces),
    )


def _decoder_steps(backend: Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        raise CheckpointError("tokenizer.json has no decoder", field="tokenizer.json")
    decoder = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    for step in steps:
        if not _is_known(step):
            message = f"tokenizer.json: a decoder step {step['type']} of this form is not supported"
            raise CheckpointError(message, field="tokenizer.json")
    return steps


def _is_known(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "ByteLevel" | "ByteFallback" | "Fuse" | "Metaspace"}:
            return True
        case {"type": "Replace", "pattern": {"String": _}, "content": " "}:
            return True
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return True
    return False
