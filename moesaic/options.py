"""Command-line options made from the settings, so that every program has the same names, values and defaults.

Part of moesaic-server: the client library imports neither this module nor typer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moesaic.exit_codes import Spell
from moesaic.settings import Settings, Synonyms, Unset, load_settings
from moesaic.spelling import Spelling

_Marker = TypeVar("_Marker")
_CONFIG = Annotated[Path | None, typer.Option(help="A YAML file of settings.", show_default="none")]
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


@dataclass(frozen=True, slots=True)
class SettingFlags:
    """The settings that a command line gives: a file, and values by key. None means not given."""

    config: Path | None
    values: Mapping[str, object]
    # Tells errors how the value of a setting was written.
    spell: Spell | None = None

    @property
    def any_given(self) -> bool:
        """Whether a setting was given by a flag."""
        return any(value is not None for value in self.values.values())

    def load(self, **fixed: object) -> Settings:
        """Settings from all sources; `fixed` ones that are not None win over all. Raises InvalidArgument."""
        flags: dict[str, Any] = dict(fixed)
        for key, value in self.values.items():
            group, _, name = key.rpartition(".")
            (flags.setdefault(group, {}) if group else flags)[name] = value
        return load_settings(self.config, **flags)


def with_settings(
    *keys: str,
    defaults: Mapping[str, object] | None = None,
    words: Mapping[str, str] | None = None,
    **renamed: str,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each key, and `--config`, in place of its parameter `flags`.

    An option is called by the last part of its key, or as `renamed` says; keys of one name share an option.
    An option that is not given leaves the setting to the other sources, unless `defaults` has a value for its
    name. `words`: by name, what the help says of an option that is not given.
    """
    sharing: dict[str, list[str]] = {}
    for name, key in (*((key.rpartition(".")[2], key) for key in keys), *renamed.items()):
        sharing.setdefault(name, []).append(key)
    options = [
        _option(name, FIELDS[keys[0]], (defaults or {}).get(name), (words or {}).get(name))
        for name, keys in sharing.items()
    ]
    options += [_parameter("config", _CONFIG), _parameter("context", typer.Context)]
    parameter_of = {key: name for name, keys in sharing.items() for key in keys}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(context: typer.Context, config: Path | None, **arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in sharing}
            values = {key: given[name] for key, name in parameter_of.items()}
            spell = Spelling(context, config, parameter_of)
            command(flags=SettingFlags(config, values, spell), **arguments)

        parameters = list(inspect.signature(command, eval_str=True).parameters.values())
        index = next(index for index, parameter in enumerate(parameters) if parameter.name == "flags")
        parameters[index : index + 1] = options
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        return run

    return decorate


def run_program(command: Callable[..., None]) -> None:
    """Runs a program of one command, such as `python -m router`."""
    program = typer.Typer(add_completion=False, context_settings=HELP_OPTIONS, pretty_exceptions_enable=False)
    program.command()(command)
    program()


def meaning(field: FieldInfo) -> str:
    """The description of a setting, and its values where they can be listed."""
    assert field.description is not None
    synonyms = _marker(field, Synonyms)
    values = [
        *(get_args(_value_type(field)) if get_origin(_value_type(field)) is Literal else ()),
        *(synonyms.values if synonyms is not None else ()),
    ]
    return f"{field.description} One of {', '.join(values)}." if values else field.description


def default_words(field: FieldInfo) -> str:
    """The default of a setting as it is written, or what its absence stands for."""
    unset = _marker(field, Unset)
    if unset is not None:
        return unset.words
    match field.default:
        case bool() as switch:
            return str(switch).lower()
        case float() as number:
            return f"{number:g}"
        case ():
            return "none"
        case value:
            return str(value)


def _option(name: str, field: FieldInfo, default: object, words: str | None) -> inspect.Parameter:
    value_type = _value_type(field)
    if get_origin(value_type) is Literal:
        value_type = str  # the settings refuse a wrong value, whichever source it comes from
    elif get_origin(value_type) is tuple:
        value_type = list[str]
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=meaning(field),
        show_default=words or default_words(field) if default is None else True,
    )
    return _parameter(name, Annotated[value_type | None, option], default)


def _parameter(name: str, annotation: object, default: object = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value_type(field: FieldInfo) -> Any:
    """The type of a setting's values, without None."""
    if NoneType in get_args(field.annotation):
        return next(each for each in get_args(field.annotation) if each is not NoneType)
    return field.annotation


def _marker(field: FieldInfo, kind: type[_Marker]) -> _Marker | None:
    return next((each for each in field.metadata if isinstance(each, kind)), None)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


FIELDS: Mapping[str, FieldInfo] = dict(_fields(Settings))
