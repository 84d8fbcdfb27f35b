"""Content in parts or as text: a template gets the form that it reads, as transformers gives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny_tokenizer import byte_level, write_folder
from transformers import PreTrainedTokenizerFast

from moesaic.errors import InvalidArgument
from router.text.text import load_text

Message = dict[str, Any]

_ROLE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
# Templates that read text alone.
TEXT = {
    "written as it is": _ROLE + "{{ m.content }}{% endfor %}",
    "trimmed": _ROLE + "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "added": _ROLE + "{{ m.content + eos_token }}{% endfor %}",
    "as JSON": _ROLE + "{{ m.content | tojson }}{% endfor %}",
}
_WALK = "{% for part in CONTENT %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
# Templates that read parts alone.
PARTS = {
    "walked over": _ROLE + _WALK.replace("CONTENT", "m['content']") + "{% endfor %}",
    "walked over under a name": _ROLE
    + "{% set c = m.content %}"
    + _WALK.replace("CONTENT", "c")
    + "{% endfor %}",
    "joined by a filter": _ROLE + "{{ m.content | map(attribute='text') | join(' ') }}{% endfor %}",
    "the first one": _ROLE + "{{ m.content[0].text }}{% endfor %}",
}
# Templates that read both.
BOTH = {
    "by a test": _ROLE
    + "{% if m.content is string %}{{ m.content }}{% else %}"
    + _WALK.replace("CONTENT", "m.content")
    + "{% endif %}{% endfor %}",
    "in a macro": "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}"
    + _WALK.replace("CONTENT", "content")
    + "{% endif %}{% endmacro %}"
    + _ROLE
    + "{{ show(m.content) | trim }}{{ eos_token }}{% endfor %}",
    "joined by a filter": _ROLE
    + "{{ m.content if m.content is string else m.content | map(attribute='text') | join('|') }}{% endfor %}",
}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def as_parts(messages: Sequence[Message]) -> list[Message]:
    return [{**m, "content": parts(m["content"])} for m in messages]


TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b>"},
    {"role": "assistant", "content": "Well"},
    {"role": "user", "content": "2+2?"},
]
IN_PARTS = [{**m, "content": parts(m["content"], "more </s>")} for m in TALK]
JOINED = [{**m, "content": m["content"] + "\nmore"} for m in TALK]


def ours(folder: Path, messages: Sequence[Message], *, continues: bool = False) -> str:
    return (
        load_text(folder)
        .render_chat(messages, add_generation_prompt=False, continue_final_message=continues, variables={})
        .text
    )


def theirs(folder: Path, messages: Sequence[Message], *, continues: bool = False) -> str:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=False, continue_final_message=continues
    )
    assert isinstance(rendered, str)
    return rendered


def folder_of(path: Path, template: str) -> Path:
    return write_folder(path, byte_level(), chat_template=template)


@pytest.mark.parametrize("template", [*PARTS.values(), *BOTH.values()], ids=[*PARTS, *BOTH])
def test_a_template_that_reads_parts_gets_them_as_transformers_hands_them_over(
    tmp_path: Path, template: str
) -> None:
    folder = folder_of(tmp_path, template)
    assert ours(folder, IN_PARTS) == theirs(folder, IN_PARTS)


@pytest.mark.parametrize("template", [*TEXT.values(), *BOTH.values()], ids=[*TEXT, *BOTH])
def test_a_template_that_reads_text_gets_it_as_transformers_hands_it_over(
    tmp_path: Path, template: str
) -> None:
    folder = folder_of(tmp_path, template)
    assert ours(folder, TALK) == theirs(folder, TALK)


@pytest.mark.parametrize("template", TEXT.values(), ids=TEXT)
def test_a_template_that_reads_text_alone_gets_parts_joined_by_line_ends(
    tmp_path: Path, template: str
) -> None:
    folder = folder_of(tmp_path, template)
    in_parts = [{**m, "content": parts(m["content"], "more")} for m in TALK]
    assert ours(folder, in_parts) == theirs(folder, JOINED)


@pytest.mark.parametrize("template", PARTS.values(), ids=PARTS)
def test_a_template_that_reads_parts_alone_gets_a_text_as_one_part(tmp_path: Path, template: str) -> None:
    folder = folder_of(tmp_path, template)
    assert ours(folder, TALK) == theirs(folder, as_parts(TALK))


def test_each_role_has_a_form_of_its_own(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ '<<' + messages[0].content + '>>' }}{% endif %}"
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]"
        "{% if m.role == 'user' %}"
        + _WALK.replace("CONTENT", "m.content")
        + "{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    folder = folder_of(tmp_path, template)
    read = [m if m["role"] != "user" else {**m, "content": parts(m["content"])} for m in TALK]
    assert ours(folder, TALK) == ours(folder, as_parts(TALK)) == theirs(folder, read)


def test_a_template_that_refuses_everything_but_a_question_gets_text(tmp_path: Path) -> None:
    template = (
        "{% if messages[-1].content != 'Hi' %}{{ raise_exception('only Hi') }}{% endif %}"
        "{{ messages[-1].content }}"
    )
    folder = folder_of(tmp_path, template)
    for content in ("Hi", parts("Hi")):
        assert ours(folder, [{"role": "user", "content": content}]) == "Hi"
    with pytest.raises(InvalidArgument, match="only Hi"):
        ours(folder, [{"role": "user", "content": "Ho"}])


@pytest.mark.parametrize("template", [PARTS["walked over"], BOTH["in a macro"]])
def test_the_last_part_of_the_final_message_can_be_left_open(tmp_path: Path, template: str) -> None:
    folder = folder_of(tmp_path, template)
    talk = [*as_parts(TALK), {"role": "assistant", "content": parts("It", " is")}]
    assert ours(folder, talk, continues=True) == theirs(folder, talk, continues=True)
    with pytest.raises(InvalidArgument, match="no text"):
        ours(folder, [*talk[:-1], {"role": "assistant", "content": []}], continues=True)


def test_a_template_that_shows_an_empty_turn_gets_it_in_either_form(tmp_path: Path) -> None:
    for name, template in (TEXT | PARTS).items():
        folder = folder_of(tmp_path / name, template)
        if name != "the first one":
            assert "[assistant]" in ours(folder, [TALK[1], {"role": "assistant", "content": ""}])
