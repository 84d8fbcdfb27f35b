"""In which form a chat template reads the content of messages: as text, or as a list of parts.

A template is judged by what it does, not by how it is written: it may walk over parts, join them by a filter, or
leave either to a macro. It renders one word in both forms, and a form in which the word is missing, or shown as
data, is one that the template does not read. Roles are tried one by one, because many templates read parts of a user
and only text of the system.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.errors import InvalidArgument

Message = Mapping[str, Any]
Content = str | Sequence[Mapping[str, str]]

_WORD = "probe"
# How Python and JSON show a part whose text is the word.
_SHOWN_AS_DATA = re.compile(rf"""["']text["']\s*:\s*["']{_WORD}""")


@dataclass(frozen=True, slots=True)
class ContentForm:
    """The forms that a template reads. One that reads neither gets text, as most are written for."""

    reads_text: bool
    reads_parts: bool

    def of(self, content: Content) -> Content:
        """Content as the template reads it. What it reads in the form in which it came is left as it is."""
        if isinstance(content, str):
            return content if self.reads_text or not self.reads_parts else [_part(content)]
        return content if self.reads_parts else "\n".join(part["text"] for part in content)


def content_form(render: Callable[[Sequence[Message]], str], role: str) -> ContentForm:
    """The form for messages of `role`, from what `render` makes of a conversation."""
    return ContentForm(*(_reads(render, role, content) for content in (_WORD, [_part(_WORD)])))


def _reads(render: Callable[[Sequence[Message]], str], role: str, content: Content) -> bool:
    try:
        rendered = render(_conversation(role, content))
    except InvalidArgument:
        return False
    return _WORD in rendered and not _SHOWN_AS_DATA.search(rendered)


def _conversation(role: str, content: Content) -> list[Message]:
    """The shortest one that templates accept, in one form throughout; only the message of `role` has the word."""
    message = {"role": role, "content": content}
    user = {"role": "user", "content": "x" if isinstance(content, str) else [_part("x")]}
    if role == "user":
        return [message]
    return [user, message] if role == "assistant" else [message, user]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
