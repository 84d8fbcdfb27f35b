"""How few tokens a text can have, from its length alone.

That is certain only of tokenizers that drop nothing and fuse nothing. Where a normalizer strips or replaces by a
pattern, where a pre-tokenizer drops its separators, where unknown letters become one token, or where a special token
takes the spaces around it, a text of any length may have a single token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from router.text.vocabulary import BYTE_ALPHABET

# By how much a normalizer may shorten a text, at most: composed characters and compatible ones take up to a quarter of
# the bytes of what they stand for.
_SHORTENS = {"Prepend": 1, "ByteLevel": 1, "NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 4}
_KEEPS_ALL = frozenset({"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts"})
_LONGEST_CHARACTER = 4


def bytes_per_token(backend: Tokenizer) -> int | None:
    """The most bytes of a text that one of its tokens stands for; None where there is no such bound."""
    shortening = _shortening(backend)
    pre_tokenizers = list(_steps(backend.pre_tokenizer, "pretokenizers"))
    if shortening is None or not all(map(_keeps_all, pre_tokenizers)) or not _keeps_unknown(backend):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    longest = max(len(token.encode()) for token in backend.get_vocab())
    return shortening * max(longest, _LONGEST_CHARACTER)


def _shortening(backend: Tokenizer) -> int | None:
    """The factor by which all normalizers together may shorten a text; None without a bound."""
    factor = 1
    for step in _steps(backend.normalizer, "normalizers"):
        if step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            if not pattern or len(step["content"].encode()) < len(pattern.encode()):
                return None
        elif step["type"] in _SHORTENS:
            factor *= _SHORTENS[step["type"]]
        else:
            return None
    return factor


def _keeps_all(step: Mapping[str, Any]) -> bool:
    return step["type"] in _KEEPS_ALL and step.get("behavior") != "Removed"


def _keeps_unknown(backend: Tokenizer) -> bool:
    """Whether letters that the vocabulary lacks have a token each, or one for each of their bytes."""
    vocabulary = backend.get_vocab()
    steps = [*_steps(backend.normalizer, "normalizers"), *_steps(backend.pre_tokenizer, "pretokenizers")]
    if any(step["type"] == "ByteLevel" for step in steps):
        return all(character in vocabulary for character in BYTE_ALPHABET.values())
    model = backend.model
    if getattr(model, "byte_fallback", False):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return getattr(model, "unk_token", None) in vocabulary and getattr(model, "fuse_unk", None) is False


def _steps(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, those of nested sequences in their place."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()), name)


def _flat(step: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step[name]:
        yield from _flat(inner, name)
