"""The tokenizer of a folder in Mistral's format: tekken or SentencePiece instead of tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, Tokenizer, processors

from moesaic.errors import CheckpointError
from router.text.chat_template import TOKENIZER_CONFIG_FILE
from router.text.sentencepiece import read_sentencepiece
from router.text.tekken import read_tekken
from router.text.tokenizer import TextTokenizer

TEKKEN_FILE = "tekken.json"
SENTENCEPIECE_FILE = "tokenizer.model"
ADDED_TOKENS_FILE = "added_tokens.json"
MAX_FILE_BYTES = 64 << 20

# Mistral's names of versions, such as tokenizer.model.v3, with m and a number where the model reads images.
_VERSIONED = re.compile(r".+\.model\.v(\d+)(?:m\d+)?")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def find_mistral_file(folder: Path) -> Path | None:
    """The path of tekken.json, else of the highest tokenizer.model.vN, else of tokenizer.model."""
    if (folder / TEKKEN_FILE).is_file():
        return folder / TEKKEN_FILE
    versions = [
        (int(match[1]), path) for path in folder.iterdir() if (match := _VERSIONED.fullmatch(path.name))
    ]
    if versions:
        return max(versions)[1]
    path = folder / SENTENCEPIECE_FILE
    return path if path.is_file() else None


def read_mistral_tokenizer(path: Path, config: Mapping[str, Any]) -> TextTokenizer:
    """Reads a tokenizer. `config` is the content of tokenizer_config.json, if any: further tokens, names of
    special ones, which of them begin and end a text. Raises CheckpointError that names the file."""
    if path.stat().st_size > MAX_FILE_BYTES:
        _fail(path.name, f"exceeds {MAX_FILE_BYTES} bytes")
    if path.name == TEKKEN_FILE:
        parts = read_tekken(path)
    else:
        parts = read_sentencepiece(path, spaces_everywhere=config.get("legacy") is True)
    backend = parts.backend
    _add_tokens(backend, path.parent, config)
    names = {**parts.special_names, **_configured_names(config)}
    for role, name in names.items():
        if backend.token_to_id(name) is None:
            _fail(TOKENIZER_CONFIG_FILE, f"{role} is not in the vocabulary")
    first = _added_name(config, "add_bos_token", names.get("bos_token"), default=True)
    last = _added_name(config, "add_eos_token", names.get("eos_token"), default=False)
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(name, backend.token_to_id(name)) for name in {*first, *last}],
    )
    return TextTokenizer(backend, names, begins_with_space=parts.begins_with_space)


def _add_tokens(backend: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds the tokens that came after training, in order of id. Each must get the id it is listed with."""
    listed = config.get("added_tokens_decoder")
    try:
        if listed is not None:
            tokens = {int(token_id): _added_token(entry) for token_id, entry in listed.items()}
        else:
            tokens = {token_id: _added_token({"content": name}) for name, token_id in _read_added(folder)}
        for token_id, token in sorted(tokens.items(), key=lambda item: item[0]):
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                _fail(TOKENIZER_CONFIG_FILE, f"added token {token_id} does not follow the vocabulary")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        file = TOKENIZER_CONFIG_FILE if listed is not None else ADDED_TOKENS_FILE
        raise CheckpointError(f"{file}: the added tokens cannot be read", field=file) from error


def _read_added(folder: Path) -> list[tuple[str, int]]:
    path = folder / ADDED_TOKENS_FILE
    return list(json.loads(path.read_bytes()).items()) if path.is_file() else []


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    """An added token. Without a flag it is special, as in files that list names alone."""
    flags = {flag: entry[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized") if flag in entry}
    return AddedToken(entry["content"], special=entry.get("special", True), **{"normalized": False, **flags})


def _configured_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role. Each is a text, an object with its content, or null for none."""
    found = {role: config.get(role) for role in _ROLES}
    names = {role: name.get("content") if isinstance(name, dict) else name for role, name in found.items()}
    for role, name in names.items():
        if name is not None and not isinstance(name, str):
            _fail(TOKENIZER_CONFIG_FILE, f"{role} must be a token")
    return {role: name for role, name in names.items() if name is not None}


def _added_name(config: Mapping[str, Any], key: str, name: str | None, *, default: bool) -> list[str]:
    is_added = config.get(key)
    return [name] if name is not None and (default if is_added is None else is_added) else []


def _fail(file: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{file}: {problem}", field=file)
