"""A model's config with checked values: every error names its key.

Some keys have been renamed over the years; a reader that accepts several spellings takes the first one that is present.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from moesaic.checkpoints.checkpoint import CONFIG_FILE
from moesaic.checkpoints.mistral_params import MAX_FLOAT
from moesaic.errors import CheckpointError

# No size of a model is larger. A larger number would only fail later, in another place.
_MAX_SIZE = (1 << 31) - 1


class Config:
    """The values of a config.json, or of a part of it. `spelling` maps keys to the names that the file has for them."""

    def __init__(
        self, values: Mapping[str, Any], *, file: str = CONFIG_FILE, spelling: Mapping[str, str] | None = None
    ) -> None:
        self.values = values
        self._file = file
        self._spellings = spelling or {}

    def fail(self, key: str, problem: str) -> NoReturn:
        field = f"{self._file}: {self._spellings.get(key, key)}"
        raise CheckpointError(f"{field}: {problem}", field=field)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def size(self, *keys: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        """A whole number above zero. Without a default, the key is required."""
        key = self.first_present(keys)
        if self.values.get(key) is None and default is not None:
            return default
        if key not in self.values:
            self.fail(key, "is missing")
        value = self.values[key]
        if type(value) is not int or value < 1:
            self.fail(key, "must be a whole number above zero")
        if value > most:
            self.fail(key, f"must be at most {most}")
        return value

    def optional_size(self, *keys: str) -> int | None:
        """A whole number above zero, or None if it is missing or null."""
        key = self.first_present(keys)
        return None if self.values.get(key) is None else self.size(key)

    def count(self, *keys: str, default: int = 0, most: int = _MAX_SIZE) -> int:
        """A whole number that may be zero."""
        key = self.first_present(keys)
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or value < 0:
            self.fail(key, "must be a whole number")
        if value > most:
            self.fail(key, f"must be at most {most}")
        return value

    def number(self, *keys: str, default: float) -> float:
        """A finite number above zero."""
        key = self.first_present(keys)
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
            self.fail(key, "must be a number above zero")
        return float(value)

    def flag(self, *keys: str, default: bool) -> bool:
        key = self.first_present(keys)
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the allowed words; the first one if the key is missing."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            self.fail(key, f"must be one of: {', '.join(allowed)}")
        return str(value)

    def sizes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers that may be zero; empty if the key is missing."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            self.fail(key, "must be a list of whole numbers")
        return tuple(value)

    def first_present(self, keys: tuple[str, ...]) -> str:
        """The first of the keys that is present, or the first one if none is."""
        return next((key for key in keys if key in self.values), keys[0])
