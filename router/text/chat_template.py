"""The checkpoint's own chat template, which renders a conversation as text.

A template is a program that comes with the weights. It runs in jinja2's immutable sandbox, with the functions
that templates expect and bounds on time and output. Requests bring messages and variables, never templates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moesaic.errors import CheckpointError, InvalidArgument
from router.text.content_form import Content, ContentForm, content_form

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
DEFAULT_TEMPLATE = "default"

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 16 << 20
MAX_RENDER_S = 5.0
_MAX_MESSAGE_CHARS = 200
# Marks the end of the final message while the template runs, so that it can be found in the output. The space
# shows whether the template strips messages.
_END = "\U0001fffe "
# The roles whose content a template may read in a form of its own. A client may invent others.
_KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def find_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template's text from a file of its own, else from tokenizer_config.json, where the one named
    default is taken of several. Raises CheckpointError."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return _checked(path.read_text(encoding="utf-8"), TEMPLATE_FILE)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path.name} is not UTF-8", field=path.name) from error
    path = folder / TEMPLATE_JSON_FILE
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())["chat_template"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path.name} holds no chat_template", field=path.name) from error
        return _checked(found, TEMPLATE_JSON_FILE)
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = (entry for entry in found if isinstance(entry, dict))
        found = next((e.get("template") for e in named if e.get("name") == DEFAULT_TEMPLATE), None)
    return None if found is None else _checked(found, TOKENIZER_CONFIG_FILE)


class ChatTemplate:
    """One template. `special_names`: tokens by role, which it may write. Thread-safe."""

    def __init__(self, source: str, special_names: Mapping[str, Any] | None = None) -> None:
        """Raises CheckpointError for a source that does not compile."""
        self._template = _compiled(source)
        self._special_names = dict(special_names or {})
        # By role, for the roles that templates know; never more.
        self._forms: dict[str, ContentForm] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Raises InvalidArgument for messages that it cannot render."""
        talk = [self._readable(message) for message in messages]
        if continue_final_message:
            talk[-1]["content"] = _marked_end(talk[-1]["content"])
        rendered = self._render(talk, variables, add_generation_prompt=add_generation_prompt)
        return _left_open(rendered) if continue_final_message else rendered

    def _readable(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content in a form that the template reads."""
        return {**message, "content": self._form(message["role"]).of(message["content"])}

    def _form(self, role: str) -> ContentForm:
        role = role if role in _KNOWN_ROLES else "user"
        form = self._forms.get(role)
        if form is None:
            form = self._forms[role] = content_form(
                lambda talk: self._render(talk, {}, add_generation_prompt=False), role
            )
        return form

    def _render(
        self, talk: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, add_generation_prompt: bool
    ) -> str:
        variables = {
            "tools": None,
            "documents": None,
            **self._special_names,
            **variables,
            "messages": talk,
            "add_generation_prompt": add_generation_prompt,
            _Deadline.KEY: _Deadline(),
        }
        try:
            return _bounded(self._template.generate(variables), variables[_Deadline.KEY])
        except Exception as error:  # a template is a program: any failure of it is an error of this request
            raise InvalidArgument(f"messages: {_template_message(error)}", field="messages") from error


def _marked_end(content: Content) -> Content:
    """Content with the mark behind its last text."""
    if isinstance(content, str):
        return content + _END
    if not content:
        raise InvalidArgument(
            "continue_final_message: the final message has no text", field="continue_final_message"
        )
    *parts, last = content
    return [*parts, {**last, "text": last["text"] + _END}]


def _left_open(rendered: str) -> str:
    """The rendered text up to the end of the final message."""
    mark = _END.rstrip()
    end = rendered.rfind(mark)
    if end < 0:
        raise InvalidArgument(
            "continue_final_message: the model's chat template leaves the final message out",
            field="continue_final_message",
        )
    is_stripped = not rendered.startswith(_END, end)
    return rendered[:end].rstrip() if is_stripped else rendered[:end]


class _Deadline:
    """The time by which a rendering must have ended."""

    KEY = "_deadline"

    def __init__(self) -> None:
        self._at_s = time.monotonic() + MAX_RENDER_S

    def check(self) -> None:
        if time.monotonic() > self._at_s:
            raise SecurityError("this model's chat template takes too long to render them")


def _bounded(pieces: Iterable[str], deadline: _Deadline) -> str:
    rendered: list[str] = []
    num_chars = 0
    for piece in pieces:
        deadline.check()
        num_chars += len(piece)
        _check_size(num_chars)
        rendered.append(piece)
    return "".join(rendered)


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training. Here it stands for its own content."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it as an instance variable)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Bounds what jinja's sandbox does not. The sandbox limits a single range(), but neither nested loops,
    recursive macros, nor the results of *, **, + and ~, which a few turns of a loop can double many times."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "_timed")
        # All are listed before any is changed, because they may be nested.
        for joined in list(template.find_all(nodes.Concat)):
            joined.nodes = [_filtered(nodes.List(joined.nodes, lineno=joined.lineno), "_joined")]
        return template

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[_Deadline.KEY].check()
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("this model's chat template computes powers")
        if operator == "+":
            if isinstance(left, Sized) and isinstance(right, Sized):
                _check_size(len(left) + len(right))
            return super().call_binop(context, operator, left, right)
        for value, times in ((left, right), (right, left)):
            if isinstance(value, Sized) and isinstance(times, int):
                _check_size(len(value) * times)
        return super().call_binop(context, operator, left, right)


@pass_context
def _timed(context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
    deadline = context[_Deadline.KEY]
    for item in iterable:
        deadline.check()
        yield item


def _joined(values: Sequence[Any]) -> str:
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _filtered(expression: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The tojson filter without the HTML escapes of jinja's own."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters.update(tojson=_to_json, _timed=_timed, _joined=_joined)
    # It makes text of any length by a single call.
    del environment.globals["lipsum"]
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_ENVIRONMENT = _environment()


def _compiled(source: str) -> Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except TemplateSyntaxError as error:
        why = f"line {error.lineno}: {_template_message(error)}"
        raise CheckpointError(f"the chat template does not compile: {why}", field="chat_template") from error


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_RENDERED_CHARS:
        raise SecurityError("this model's chat template makes too much of them")


def _template_message(error: Exception) -> str:
    if isinstance(error, TemplateError) and error.message:
        return error.message[:_MAX_MESSAGE_CHARS]
    return "this model's chat template cannot render them"


def _checked(template: object, name: str) -> str:
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS:
        message = f"{name}: chat_template must be text of at most {MAX_TEMPLATE_CHARS} characters"
        raise CheckpointError(message, field=name)
    return template
