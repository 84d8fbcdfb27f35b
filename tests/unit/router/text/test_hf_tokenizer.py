"""Folders with a tokenizer.json, and what their other files say over it: as AutoTokenizer reads them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_tokenizer import byte_level, sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from router.text.text import load_text

FAMILIES = [
    "deepseek_v3", "gpt_oss", "granitemoe", "llama", "mistral", "mixtral", "olmoe", "phi", "phimoe", "qwen2_moe",
    "qwen3_moe",
]  # fmt: skip
KINDS: dict[str, tuple[Callable[[], Tokenizer], list[str]]] = {
    "sentencepiece": (sentencepiece, ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"]),
    "bytes": (
        byte_level,
        ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"],
    ),
}
# None: the file does not have the key.
CHOICES: dict[str, list[Any]] = {
    "add_prefix_space": [None, False, True],
    "add_bos_token": [None, False, True],
    "add_eos_token": [None, True],
    "legacy": [None, False, True],
    "clean_up_tokenization_spaces": [None, True],
    "extra_special_tokens": [None, ["<extra>"]],
    "model_max_length": [None, 3],
}
TEXTS = [
    "hello",
    " hello",
    "the hen said: stop",
    "a</s>b <s>c",
    "Ünïcode 東京 😀",
    "",
    "  two  spaces \n",
    "x <extra>y<tool> z",
]


def write_folder(folder: Path, family: str, tokenizer: Tokenizer, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    given = {key: value for key, value in values.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


def assert_as_auto_tokenizer(folder: Path) -> None:
    text, reference = load_text(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(reference, PreTrainedTokenizerFast)
    for prompt, special in itertools.product(TEXTS, (True, False)):
        expected = reference(prompt, add_special_tokens=special, truncation=False)["input_ids"]
        assert list(text.encode(prompt, add_special_tokens=special)) == expected, prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_auto_tokenizer_whatever_the_config_says(
    tmp_path: Path, family: str, kind: str
) -> None:
    make, classes = KINDS[kind]
    draw = random.Random(f"{family} {kind}")
    for number in range(12):
        config = {key: draw.choice(choices) for key, choices in CHOICES.items()}
        config["tokenizer_class"] = draw.choice(classes)
        assert_as_auto_tokenizer(write_folder(tmp_path / str(number), family, make(), **config))


@pytest.mark.parametrize("wanted", [False, True])
def test_a_llama_has_a_space_in_front_where_its_config_wants_one(tmp_path: Path, wanted: bool) -> None:
    options = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": wanted}
    text = load_text(write_folder(tmp_path, "llama", sentencepiece(), **options))
    token_ids = text.encode("he", add_special_tokens=False)
    assert text.token(token_ids[0]).startswith("▁") == wanted
    assert text.decode(token_ids, skip_special_tokens=True) == "he"


def test_code_of_the_folder_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = write_folder(
        tmp_path / "model",
        "llama",
        sentencepiece(),
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    )
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass OwnTokenizer: ...\n")
    expected = sentencepiece().encode("hello").ids
    assert list(load_text(folder).encode("hello", add_special_tokens=True)) == expected
    assert not trace.exists()


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "nothing_known"}'])
def test_a_tokenizer_is_read_as_it_lies_where_the_model_has_no_class(
    tmp_path: Path, config: str | None
) -> None:
    write_folder(tmp_path, "llama", byte_level())
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    expected = byte_level().encode("hello hen").ids
    assert list(load_text(tmp_path).encode("hello hen", add_special_tokens=True)) == expected
