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
    """The values of a config.json, or of a part of it, and the family's defaults for the keys that it leaves out. `spelling`
    maps keys to the names that the file has for them.

    The argument `default` of a reader stands for a null, and for a missing key without a default of the family. Without it, a
    null means the same as a missing key to all readers but those of sizes, which refuse it.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        file: str = CONFIG_FILE,
        spelling: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._given = values
        self._defaults = defaults or {}
        self.values = {**self._defaults, **values}
        self._file = file
        self._spellings = spelling or {}

    def fail(self, key: str, problem: str) -> NoReturn:
        field = f"{self._file}: {self._spellings.get(key, key)}"
        if key not in self._given and key in self._defaults:
            problem = f"is missing, and the default of the family, {self._defaults[key]}, {problem}"
        raise CheckpointError(f"{field}: {problem}", field=field)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def size(self, *keys: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        """A whole number above zero. Without a default, the key is required."""
        key = self.first_present(keys)
        if key not in self.values and default is None:
            self.fail(key, "is missing")
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            self.fail(key, "must be a whole number above zero")
        if value > most:
            self.fail(key, f"must be at most {most}")
        return value

    def optional_size(self, *keys: str) -> int | None:
        """A whole number above zero, or None if it is missing or null."""
        key = self.first_present(keys)
        return None if self.values.get(key) is None else self.size(key)

    def count(self, *keys: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        """A whole number that may be zero."""
        key, value = self._read(keys, default)
        if type(value) is not int or value < 0:
            self.fail(key, "must be a whole number")
        if value > most:
            self.fail(key, f"must be at most {most}")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number above zero."""
        key, value = self._read(keys, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
            self.fail(key, "must be a number above zero")
        return float(value)

    def flag(self, *keys: str, default: bool | None = None) -> bool:
        key, value = self._read(keys, default)
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
        """The first of the keys that the file has; if it has none, the one that has a default, or else the first."""
        found = (key for present in (self._given, self._defaults) for key in keys if key in present)
        return next(found, keys[0])

    def _read(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        """The key that is present, and its value."""
        key = self.first_present(keys)
        value = self.values.get(key)
        if value is None:
            value = self._defaults.get(key) if default is None else default
        return key, value
