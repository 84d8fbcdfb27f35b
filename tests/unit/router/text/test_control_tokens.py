"""What a message spells like a control token stays text; what the template writes is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mistral_tokenizers import write_sentencepiece, write_tekken
from support.tiny_tokenizer import byte_level, sentencepiece, write_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moesaic.errors import InvalidArgument
from router.text.text import Text, load_text

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
KINDS = ("byte_level", "sentencepiece", "mistral_sentencepiece", "tekken")


def folder_of(kind: str, folder: Path, template: str = TEMPLATE) -> Path:
    match kind:
        case "byte_level":
            return write_folder(folder, byte_level(), chat_template=template)
        case "sentencepiece":
            return write_folder(folder, sentencepiece(), chat_template=template)
        case "tekken":
            write_tekken(folder)
        case "mistral_sentencepiece":
            write_sentencepiece(folder, controls=("[INST]",))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Text]:
    return {kind: load_text(folder_of(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}


def talk(text: Text, *contents: str, **variables: object) -> tuple[str, tuple[int, ...]]:
    conversation = text.render_chat(
        [{"role": "user", "content": content} for content in contents],
        add_generation_prompt=False,
        continue_final_message=False,
        variables=variables,
    )
    return conversation.text, conversation.encode()


def without_spaces(content: str) -> str:
    """Tokenizers of old put a space behind every control token."""
    return content.replace(" ", "")


def test_control_tokens_of_the_template_are_tokens_and_those_of_a_message_are_not(
    texts: dict[str, Text],
) -> None:
    for text in texts.values():
        shown, ids = talk(text, "hen</s>hen<s>", "[INST]a</s>")
        assert shown == "<s>user: hen</s>hen<s></s>user: [INST]a</s></s>"
        assert (ids.count(1), ids.count(2)) == (1, 2)
        assert without_spaces(text.decode(ids, skip_special_tokens=False)) == without_spaces(shown)
        assert "hen</s>hen<s>" in text.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(st.text("hen [INST]</s>s<é😀\n", max_size=24), min_size=1, max_size=3))
def test_a_conversation_is_its_text_with_the_same_control_tokens_whatever_it_spells(
    texts: dict[str, Text], contents: list[str]
) -> None:
    for text in texts.values():
        shown, ids = talk(text, *contents)
        assert shown == "<s>" + "".join(f"user: {content}</s>" for content in contents)
        assert (ids.count(1), ids.count(2)) == (1, len(contents))
        assert without_spaces(text.decode(ids, skip_special_tokens=False)) == without_spaces(shown)


@settings(max_examples=100, deadline=None)
@given(content=st.text("hen thé 東\n", max_size=24))
def test_text_beside_a_spelled_control_token_has_the_tokens_that_it_has_anywhere(
    texts: dict[str, Text], content: str
) -> None:
    """Keeping them apart costs the text around nothing: no cut, no further space."""
    for kind, text in texts.items():
        _, plain = talk(text, content)
        _, marked = talk(text, content, "</s>")
        assert marked[: len(plain)] == plain, kind


def test_values_of_variables_and_names_of_roles_are_text_too(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ mood }}{{ deep.list[0] }}{{ deep.names | tojson }}{{ messages[0].role }}"
    text = load_text(folder_of("byte_level", tmp_path, template))
    conversation = text.render_chat(
        [{"role": "</s>", "content": ""}],
        add_generation_prompt=False,
        continue_final_message=False,
        variables={"mood": "<s>", "deep": {"list": ["<unk>"], "names": {"<s>": "<s>"}}},
    )
    ids = conversation.encode()
    assert conversation.text == '<s><s><unk>{"<s>": "<s>"}</s>'
    assert (ids.count(0), ids.count(1), ids.count(2)) == (0, 1, 0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content.split('</s>')[0] }}{{ eos_token }}", "a</s>"),
        ("{{ messages[0].content.split('</s>')[1] }}{{ eos_token }}", "b</s>"),
        ("{{ messages[0].content[:4] }}{{ eos_token }}", "a</s</s>"),
        ("{{ messages[0].content | upper }}{{ eos_token }}", "A</S>B</s>"),
    ],
)
def test_a_template_may_cut_a_message_anywhere(tmp_path: Path, template: str, expected: str) -> None:
    text = load_text(folder_of("byte_level", tmp_path, template))
    shown, ids = talk(text, "a</s>b")
    assert ids.count(2) == 1
    assert ids[-1] == 2
    assert text.decode(ids, skip_special_tokens=False) == shown
    assert shown.endswith("</s>")


def test_added_tokens_that_are_no_control_tokens_are_tokens_wherever_they_stand(
    texts: dict[str, Text],
) -> None:
    text = texts["byte_level"]
    (tool,) = text.encode("<tool>", add_special_tokens=False)
    _, plain = talk(text, "<tool>")
    _, marked = talk(text, "<tool></s>")
    assert plain.count(tool) == marked.count(tool) == 1


@pytest.mark.parametrize("mark", ["\U0010fffe", "\U0010ffff"])
def test_a_message_cannot_bring_the_marks_themselves(texts: dict[str, Text], mark: str) -> None:
    for text in texts.values():
        with pytest.raises(InvalidArgument) as caught:
            talk(text, f"{mark}2{mark}")
        assert caught.value.field == "messages"


def words(contents: Sequence[str]) -> Tokenizer:
    """A tokenizer whose model makes a control token of plain text: no marks can keep the two apart."""
    vocab = {word: token_id for token_id, word in enumerate(["<unk>", "<s>", "</s>", *contents])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


def test_where_text_cannot_be_told_from_control_tokens_the_request_is_refused(tmp_path: Path) -> None:
    template = "{{ bos_token }} {{ messages[0].content }}"
    text = load_text(write_folder(tmp_path, words(["hen"]), chat_template=template))
    assert talk(text, "hen egg")[1] == (1, 3, 0)
    assert talk(text, "hen <unk>")[1] == (1, 3, 0)
    with pytest.raises(InvalidArgument, match="cannot be told"):
        talk(text, "hen </s>")
