"""Tokenizers of folders without a tokenizer.json: tiny ones made here, and the files that Mistral publishes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mistral_tokenizers import sentencepiece_model_bytes, tekken, write_sentencepiece, write_tekken
from support.tiny_tokenizer import byte_level, write_folder

from moesaic.errors import CheckpointError
from router.text.mistral_tokenizer import find_mistral_file
from router.text.text import Text, load_text

V1, V2, V3, V7 = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
)
TEKKEN, TEKKEN_WITH_IMAGES = "tekken_240718.json", "tekken_240911.json"
PUBLISHED = (V1, V2, V3, V7, TEKKEN, TEKKEN_WITH_IMAGES)


def spelled(text: Text, content: str, *, add_special_tokens: bool = False) -> list[str]:
    return [text.token(i) for i in text.encode(content, add_special_tokens=add_special_tokens)]


def streamed(text: Text, ids: tuple[int, ...]) -> list[str]:
    detokenizer = text.detokenizer((), skip_special_tokens=True)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


# Which file.


def test_tokenizer_json_goes_before_all_others_then_tekken_then_the_highest_version(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    assert find_mistral_file(tmp_path) == tmp_path / "tokenizer.model"
    for name in ("tokenizer.model.v3", "tokenizer.model.v11", "tokenizer.model.v2", "tokenizer.model.old"):
        write_sentencepiece(tmp_path, name)
    assert find_mistral_file(tmp_path) == tmp_path / "tokenizer.model.v11"
    write_tekken(tmp_path)
    assert find_mistral_file(tmp_path) == tmp_path / "tekken.json"
    assert load_text(tmp_path).token(3) == "[INST]"
    write_folder(tmp_path, byte_level())
    assert load_text(tmp_path).token(3) != "[INST]"


def test_a_folder_with_no_such_file_has_no_tokenizer_of_mistrals(tmp_path: Path) -> None:
    assert find_mistral_file(tmp_path) is None


# SentencePiece.


def test_pieces_merge_by_score_and_what_has_no_piece_is_bytes(tmp_path: Path) -> None:
    text = load_text(write_sentencepiece(tmp_path))
    assert spelled(text, "hen the  hen") == ["▁hen", "▁the", "▁", "▁hen"]
    assert spelled(text, "é東") == ["▁", "é", "<0xE6>", "<0x9D>", "<0xB1>"]
    assert spelled(text, " hen") == ["▁", "▁hen"]
    assert spelled(text, "") == []


def test_a_text_begins_with_the_token_that_the_model_begins_with(tmp_path: Path) -> None:
    text = load_text(write_sentencepiece(tmp_path))
    assert spelled(text, "hen", add_special_tokens=True) == ["<s>", "▁hen"]
    assert spelled(text, "", add_special_tokens=True) == ["<s>"]
    assert text.eos_token_ids == {2}


def test_the_first_space_is_put_in_front_of_text_and_not_of_control_tokens(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, controls=("[INST]",), user_defined=("<user>",))
    text = load_text(folder)
    assert spelled(text, "</s>hen hen") == ["</s>", "h", "en", "▁hen"]
    assert spelled(text, "[INST] hen") == ["[INST]", "▁hen"]
    assert spelled(text, "<user> hen<user>a") == ["▁", "<user>", "▁hen", "<user>", "a"]


def test_an_old_tokenizer_puts_a_space_behind_control_tokens_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": true}')
    text = load_text(write_sentencepiece(tmp_path))
    assert spelled(text, "</s>hen hen") == ["</s>", "▁hen", "▁hen"]


def test_a_model_without_a_first_space_of_its_own_neither_adds_nor_drops_one(tmp_path: Path) -> None:
    text = load_text(write_sentencepiece(tmp_path, add_dummy_prefix=False))
    assert spelled(text, "hen") == ["h", "en"]
    ids = text.encode(" hen", add_special_tokens=False)
    assert text.decode(ids, skip_special_tokens=True) == " hen"


def test_a_character_in_bytes_is_streamed_with_its_last_byte(tmp_path: Path) -> None:
    text = load_text(write_sentencepiece(tmp_path))
    ids = text.encode("😀 hen", add_special_tokens=False)
    assert streamed(text, ids) == ["", "", "", "", "😀", " hen", ""]
    assert text.spell(ids[1]) == ("�", b"\xf0")


@settings(max_examples=200, deadline=None)
@given(content=st.text("hent é東<>/s▁ \n😀", max_size=30))
def test_sentencepiece_text_comes_back_as_it_was(tiny: Text, content: str) -> None:
    ids = tiny.encode(content, add_special_tokens=False)
    assert tiny.decode(ids, skip_special_tokens=False) == content.replace("▁", " ")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return load_text(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


def test_tokens_that_were_added_after_the_training_get_the_ids_that_they_are_listed_with(
    tmp_path: Path,
) -> None:
    write_sentencepiece(tmp_path)
    size = len(load_text(tmp_path).encode("", add_special_tokens=False)) + first_free_id(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size, "<|turn|>": size + 1}))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|end|>", "bos_token": {"content": "<s>"}}'
    )
    text = load_text(tmp_path)
    assert text.encode("<|turn|>hen<|end|>", add_special_tokens=False)[::3] == (size + 1, size)
    assert text.eos_token_ids == {size}
    assert text.decode((size, size + 1), skip_special_tokens=True) == ""


def first_free_id(folder: Path) -> int:
    text = load_text(folder)
    return next(token_id for token_id in range(10_000) if not text.token(token_id))


def test_added_tokens_say_whether_they_are_special(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    free = first_free_id(tmp_path)
    listed = {
        "1": {"content": "<s>", "special": True},
        str(free): {"content": "<tool>", "special": False},
        str(free + 1): {"content": "<|end|>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    text = load_text(tmp_path)
    assert text.decode((free, free + 1), skip_special_tokens=True) == "<tool>"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": False}, ["▁hen"]),
        ({"add_eos_token": True}, ["<s>", "▁hen", "</s>"]),
        ({"bos_token": None}, ["<s>", "▁hen"]),
    ],
)
def test_the_folder_says_what_a_text_begins_and_ends_with(
    tmp_path: Path, config: dict[str, Any], expected: list[str]
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = load_text(write_sentencepiece(tmp_path))
    assert spelled(text, "hen", add_special_tokens=True) == expected


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("tokenizer.model", b"\xff\xff no model", "tokenizer.model"),
        ("tokenizer_config.json", b'{"eos_token": "<|none|>"}', "tokenizer_config.json"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "tokenizer_config.json"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"9": {"content": "x"}}}',
            "tokenizer_config.json",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": ["x"]}', "tokenizer_config.json"),
        ("added_tokens.json", b'{"x": 100000}', "tokenizer_config.json"),
        ("added_tokens.json", b"[1]", "added_tokens.json"),
        pytest.param("added_tokens.json", b"[" * 100_000, "added_tokens.json", id="deep added_tokens.json"),
        ("tekken.json", b"{}", "tekken.json"),
        ("tekken.json", b"[", "tekken.json"),
        pytest.param("tekken.json", b"[" * 100_000, "tekken.json", id="deep tekken.json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, file: str, content: bytes, field: str) -> None:
    write_sentencepiece(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_text(tmp_path)
    assert caught.value.field == field
    assert str(tmp_path) not in caught.value.message


def _unigram(model: Any) -> None:
    model.trainer_spec.model_type = 1


def _without_bytes(model: Any) -> None:
    model.trainer_spec.byte_fallback = False


def _normalising(model: Any) -> None:
    model.normalizer_spec.precompiled_charsmap = b"rules"


def _trimming(model: Any) -> None:
    model.normalizer_spec.remove_extra_whitespaces = True


def _twice(model: Any) -> None:
    model.pieces.add(piece="▁hen", type=1, score=-1.0)


@pytest.mark.parametrize("change", [_unigram, _without_bytes, _normalising, _trimming, _twice])
def test_a_sentencepiece_model_of_another_kind_is_refused(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model

    model = sentencepiece_model.ModelProto()
    model.ParseFromString(sentencepiece_model_bytes())
    change(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_text(tmp_path)


def test_a_sentencepiece_model_whose_pieces_are_no_text_is_refused(tmp_path: Path) -> None:
    content = sentencepiece_model_bytes().replace("▁hen".encode(), b"\xff" * len("▁hen".encode()))
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match="not UTF-8"):
        load_text(tmp_path)


# Tekken.


def test_tekken_ids_are_ranks_behind_the_special_tokens(tmp_path: Path) -> None:
    text = load_text(write_tekken(tmp_path))
    assert text.encode("a hen", add_special_tokens=True) == (1, 32 + ord("a"), 32 + 259)
    assert text.token(31) == "<SPECIAL_31>"
    assert text.token(4) == "[/INST]"
    assert text.eos_token_ids == {2}


def test_tekken_text_has_no_space_of_its_own_and_bytes_join_to_characters(tmp_path: Path) -> None:
    text = load_text(write_tekken(tmp_path))
    ids = text.encode(" hen 😀", add_special_tokens=False)
    assert [text.spell(i)[1] for i in ids] == [b" hen", b" ", "😀".encode()[:3], "😀".encode()[3:]]
    assert streamed(text, ids) == [" hen", " ", "", "😀", ""]


def test_a_tekken_file_may_list_its_special_tokens(tmp_path: Path) -> None:
    text = load_text(write_tekken(tmp_path, specials=("<unk>", "<s>", "</s>", "[THINK]")))
    assert spelled(text, "[THINK]a<SPECIAL_4>") == ["[THINK]", "a", "<SPECIAL_4>"]


def _without_a_byte(content: dict[str, Any]) -> None:
    content["vocab"].pop(7)


def _one_twice(content: dict[str, Any]) -> None:
    content["vocab"][258] = content["vocab"][257]


def _no_end(content: dict[str, Any]) -> None:
    content["special_tokens"] = [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}]


def _a_special_twice(content: dict[str, Any]) -> None:
    names = ("<unk>", "<s>", "</s>", "<s>")
    content["special_tokens"] = [{"rank": rank, "token_str": name} for rank, name in enumerate(names)]


def _no_pattern(content: dict[str, Any]) -> None:
    del content["config"]["pattern"]


def _a_pattern_that_is_none(content: dict[str, Any]) -> None:
    content["config"]["pattern"] = "(("


def _places_for_more_than_there_is_memory(content: dict[str, Any]) -> None:
    content["config"]["default_num_special_tokens"] = 10**12


def _out_of_order(content: dict[str, Any]) -> None:
    content["vocab"][:2] = content["vocab"][1::-1]


@pytest.mark.parametrize(
    "change",
    [
        *(_without_a_byte, _one_twice, _no_end, _a_special_twice, _no_pattern, _a_pattern_that_is_none),
        *(_places_for_more_than_there_is_memory, _out_of_order),
    ],
)
def test_a_tekken_file_that_is_not_whole_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = tekken()
    change(content)
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not a tekken tokenizer"):
        load_text(tmp_path)


# The published files.


def published(name: str) -> Path:
    mistral_common = pytest.importorskip("mistral_common", reason="mistral-common brings the published files")
    return Path(mistral_common.__file__).parent / "data" / name


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Text]:
    found = {}
    for name in PUBLISHED:
        folder = tmp_path_factory.mktemp(name)
        target = "tekken.json" if name.endswith(".json") else name
        shutil.copy(published(name), folder / target)
        found[name] = load_text(folder)
    return found


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    pytest.importorskip("mistral_common", reason="mistral-common brings the published files")
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return {
        name: MistralTokenizer.from_file(published(name)).instruct_tokenizer.tokenizer for name in PUBLISHED
    }


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (V1, "Hello world", (22557, 1526)),
        (V1, "hello", (6312, 28709)),
        (V3, "Hello world", (23325, 2294)),
        (V3, "hello", (7080, 29477)),
        (V1, " ", (259,)),
        (TEKKEN, "Be", (5934,)),
    ],
)
def test_published_tokenizers_give_the_known_ids(
    texts: dict[str, Text], name: str, content: str, expected: tuple[int, ...]
) -> None:
    assert texts[name].encode(content, add_special_tokens=False) == expected
    assert texts[name].encode(content, add_special_tokens=True) == (1, *expected)


def test_published_vocabularies_are_laid_out_as_known(texts: dict[str, Text]) -> None:
    assert [texts[V1].token(i) for i in (0, 1, 2, 3, 258, 259)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0xFF>",
        "▁▁",
    ]
    assert [texts[V3].token(i) for i in (3, 4, 771, 1026)] == ["[INST]", "[/INST]", "<0x00>", "<0xFF>"]
    assert [texts[TEKKEN_WITH_IMAGES].token(i) for i in (10, 12, 13)] == ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    assert [texts[TEKKEN].spell(1000 + byte)[1] for byte in (0, 255)] == [b"\x00", b"\xff"]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(PUBLISHED),
    content=st.one_of(
        st.text(max_size=40),
        st.text(" a\n=-_*#0e", max_size=80),
        st.text("Once upon, naïve 東京 😀👩‍🚀▁\t.", max_size=60),
    ),
)
def test_published_tokenizers_give_the_ids_and_the_text_of_the_original_libraries(
    texts: dict[str, Text], originals: dict[str, Any], name: str, content: str
) -> None:
    ids = texts[name].encode(content, add_special_tokens=False)
    assert list(ids) == originals[name].encode(content, bos=False, eos=False)
    text = texts[name].decode(ids, skip_special_tokens=True)
    assert text == originals[name].decode(list(ids))
    assert "".join(streamed(texts[name], ids)) == text


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers_give_the_ids_of_the_original_libraries_for_a_long_text(
    texts: dict[str, Text], originals: dict[str, Any], shared: Path, name: str
) -> None:
    content = (shared / "corpora/drama.txt").read_text()[:100_000]
    ids = texts[name].encode(content, add_special_tokens=False)
    assert list(ids) == originals[name].encode(content, bos=False, eos=False)
    assert "".join(streamed(texts[name], ids)) == content


@pytest.mark.parametrize(
    "content",
    ["x [REFERENCE_DOC_3] y", "[REFERENCE_DOC_3] y", " [REFERENCE_DOC_3]", "a[REFERENCE_DOC_3]b  c"],
)
def test_symbols_of_a_users_own_are_tokens_within_a_text(
    texts: dict[str, Text], originals: dict[str, Any], content: str
) -> None:
    assert list(texts[V3].encode(content, add_special_tokens=False)) == originals[V3].encode(
        content, bos=False, eos=False
    )
