"""How a person wrote the value that an error is about: as a flag, an argument, a variable, or in a file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import typer

from moesaic.settings import find_written

# Of a value: enough for a path, and a small part of a prompt.
_MAX_CHARS = 200


class Spelling:
    """The parameters of a running command, and behind them the settings of its other sources."""

    def __init__(
        self,
        context: typer.Context,
        config: Path | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        """`parameters`: by key of a setting, the name of the parameter that sets it."""
        self._config = config
        self._parameters = parameters or {}
        self._names: dict[str, str] = {}
        self._given: dict[str, str] = {}
        for parameter in context.command.params:
            name = str(parameter.name)
            self._names[name] = _name(parameter)
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                self._given[name] = _written(parameter, context.params.get(name))

    def __call__(self, field: str) -> str | None:
        """`field`: the name of a parameter, the key of a setting, or the last part of one."""
        keys = [key for key in self._parameters if key == field or key.endswith(f".{field}")] or [field]
        names = [self._parameters.get(key, key) for key in keys]
        sources = chain(
            map(self._given.get, names),
            (find_written(key, self._config) for key in keys),
            map(self._names.get, names),
        )
        return next((source for source in sources if source is not None), None)


def _name(parameter: Any) -> str:
    return str(max(parameter.opts, key=len)) if _is_option(parameter) else str(parameter.name)


def _written(parameter: Any, value: object) -> str:
    if isinstance(value, bool):
        return _name(parameter) if value else str((*parameter.secondary_opts, _name(parameter))[0])
    words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if len(words) > _MAX_CHARS:
        words = f"{words[:_MAX_CHARS]}…"
    return f"{_name(parameter)} {shlex.quote(words) if _is_option(parameter) else repr(words)}"


def _is_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option")
