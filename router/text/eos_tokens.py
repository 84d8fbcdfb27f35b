"""The end-of-sequence ids of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """The ids in generation_config.json, or without an entry there, in config.json. Raises CheckpointError."""
    for name in ("generation_config.json", "config.json"):
        found = read_object(folder / name).get("eos_token_id")
        if found is not None:
            return _checked(found, name)
    return frozenset()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not a JSON object", field=path.name) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", field=path.name)
    return found


def _checked(found: object, name: str) -> frozenset[int]:
    token_ids = found if isinstance(found, list) else [found]
    if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
        message = f"{name}: eos_token_id must be a token id or a list of token ids"
        raise CheckpointError(message, field="eos_token_id")
    return frozenset(token_ids)
