"""Where chat templates come from, what they may call, and how far they get."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import CheckpointError, InvalidArgument
from router.text import chat_template
from router.text.chat_template import ChatTemplate, find_template

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well <b> "}]


def render(source: str, *, continues: bool = False, **variables: Any) -> str:
    return ChatTemplate(source).render(
        TALK, add_generation_prompt=False, continue_final_message=continues, variables=variables
    )


# Where from.


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        (
            {"chat_template.jinja": "A", "chat_template.json": '{"chat_template": "B"}'},
            {"chat_template": "C"},
            "A",
        ),
        ({"chat_template.json": '{"chat_template": "B"}'}, {"chat_template": "C"}, "B"),
        ({}, {"chat_template": "C"}, "C"),
        ({}, {"chat_template": None}, None),
        ({}, {}, None),
        (
            {},
            {"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]},
            "D",
        ),
        ({}, {"chat_template": [{"name": "rag", "template": "R"}]}, None),
    ],
)
def test_a_file_of_its_own_goes_before_the_tokenizers_config(
    tmp_path: Path, files: Mapping[str, str], config: Mapping[str, Any], expected: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert find_template(tmp_path, config) == expected


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.json", "{}"),
        ("chat_template.json", '{"chat_template": 7}'),
        ("chat_template.json", "["),
        pytest.param("chat_template.json", "[" * 100_000, id="deep"),
        pytest.param("chat_template.jinja", "x" * (chat_template.MAX_TEMPLATE_CHARS + 1), id="long"),
        ("chat_template.jinja", "caf\xe9"),
    ],
)
def test_a_file_that_holds_no_template_is_named(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        find_template(tmp_path, {})
    assert caught.value.field == file


def test_a_template_in_the_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        find_template(tmp_path, {"chat_template": {"default": "x"}})


def test_of_templates_by_name_the_default_is_taken_whatever_else_is_listed(tmp_path: Path) -> None:
    named = [{"name": ["default"], "template": "a"}, 7, {"name": "default", "template": "b"}]
    assert find_template(tmp_path, {"chat_template": named}) == "b"
    assert find_template(tmp_path, {"chat_template": named[:2]}) is None


# What they may call.


def test_json_is_written_as_it_is_and_not_for_html() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ [1, 2] | tojson(indent=1) }}") == json.dumps([1, 2], indent=1)
    assert (
        render("{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=True, sort_keys=True) }}")
        == '{"a": "\\u00e9", "b": 1}'
    )


def test_the_date_is_at_hand() -> None:
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))


def test_lines_of_blocks_leave_no_space() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_what_is_marked_as_generated_is_rendered_like_the_rest() -> None:
    source = "{% for m in messages %}{% generation %}[{{ m.role }}]{% endgeneration %}{% endfor %}"
    assert render(source) == "[user][assistant]"


def test_loops_can_be_left_and_know_where_they_are() -> None:
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last }}"
        "{% for c in m.content %}{% if c == 'e' %}{% break %}{% endif %}{{ c }}{% endfor %}{% endfor %}"
    )
    assert render(source) == "1/2Hi2/2.W"


def test_tools_and_documents_are_none_unless_they_are_given() -> None:
    assert render("{{ tools is none and documents is none }}") == "True"


def test_namespaces_and_variables_work() -> None:
    source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ x }}"
    assert render(source, x="y") == "2y"


def test_the_messages_of_the_caller_stay_as_they_were() -> None:
    before = json.dumps(TALK)
    render("{{ messages[1].content }}", continues=True)
    assert json.dumps(TALK) == before


# The final message, left open.

EVERY = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


def test_the_final_message_is_left_open_at_its_end() -> None:
    assert render(EVERY, continues=True) == "<Hi><Well <b> "


def test_where_the_template_strips_messages_the_open_one_is_stripped_too() -> None:
    assert render(EVERY.replace("m.content", "m.content | trim"), continues=True) == "<Hi><Well <b>"


def test_a_template_that_leaves_the_final_message_out_cannot_continue_it() -> None:
    with pytest.raises(InvalidArgument) as caught:
        render("{{ messages[0].content }}", continues=True)
    assert caught.value.field == "continue_final_message"


# How far they get.


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for a in 'x' * 99999 %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_a_template_may_not_take_long(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.05)
    with pytest.raises(InvalidArgument, match="takes too long"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{% set x = 'x' * 1000000 %}{% for i in range(100) %}{{ x }}{% endfor %}",
        "{{ 9 ** 9 }}",
        "{{ lipsum(n=1) }}",
        *(
            "{% set ns = namespace(x='xx') %}{% for i in range(64) %}{% set ns.x = "
            + doubled
            + " %}{% endfor %}{{ ns.x }}"
            for doubled in ("ns.x + ns.x", "ns.x ~ ns.x", "ns.x ~ (ns.x ~ '')")
        ),
        "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_a_template_may_not_make_much(source: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^messages: "):
        render(source)


def test_small_products_and_sums_are_fine() -> None:
    assert render("{{ 'ab' * 3 }}{{ 6 * 7 }}{{ 2.5 * 2 }}") == "ababab425.0"
    assert render("{{ 'ab' + 'c' }}{{ 6 + 7 }}{{ ([1] + [2]) | length }}") == "abc132"
    assert render("{{ 'a' ~ 1 ~ ('b' ~ none) ~ missing ~ [x] }}", x="y") == "a1bNone['y']"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include 'x' %}",
        "{{ messages[0].update({}) }}",
    ],
)
def test_a_template_may_not_reach_out(source: str) -> None:
    with pytest.raises(InvalidArgument):
        render(source + "{{ missing.attribute }}")
