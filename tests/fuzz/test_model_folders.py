"""Files that come with a model: config.json, the index of its shards, and those of its tokenizer.

An input is the name of a file in a line of its own, and what it holds; the others are as they should be.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from support.checkpoints import write_mixtral
from support.fuzzing import fuzzed, refusals
from support.mutations import bytes_near, json_near
from support.tiny_tokenizer import byte_level, write_folder

from moesaic.checkpoints.checkpoint import CONFIG_FILE, INDEX_FILE, open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.families import describe_model
from router.api.sampling_defaults import GENERATION_CONFIG_FILE, read_sampling_defaults
from router.text.text import load_text

GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.0,
    "repetition_penalty": 1.1,
    "eos_token_id": [2, 3],
}
OF_WEIGHTS = (CONFIG_FILE, INDEX_FILE)
OF_TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", GENERATION_CONFIG_FILE)
PLACE = tempfile.TemporaryDirectory()
CHAT = [{"role": "user", "content": "hen"}]


@cache
def valid() -> Path:
    """A model in several shards, with a tokenizer and a chat template of its own."""
    folder = write_mixtral(Path(PLACE.name) / "tiny", max_shard_size="20KB")
    write_folder(folder, byte_level(vocab_size=280))
    template = json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    (folder / GENERATION_CONFIG_FILE).write_text(json.dumps(GENERATION))
    return folder


def files(*names: str) -> st.SearchStrategy[bytes]:
    def near(name: str) -> st.SearchStrategy[bytes]:
        raw = (valid() / name).read_bytes()
        whole = json_near(json.loads(raw)) if name.endswith(".json") else st.just(raw)
        return (whole | bytes_near(whole)).map((name.encode() + b"\n").__add__)

    return st.deferred(lambda: st.one_of([near(name) for name in names]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(valid(), tmp_path_factory.mktemp("model") / "tiny"))


def spoil(folder: Path, raw: bytes, names: tuple[str, ...]) -> None:
    spoilt, _, content = raw.partition(b"\n")
    for name in names:
        (folder / name).write_bytes(content if name.encode() == spoilt else (valid() / name).read_bytes())


@fuzzed("model_folders", files(*OF_WEIGHTS), examples=40)
def test_a_model_folder_is_described_as_its_files_are_or_refused(raw: bytes, folder: Path) -> None:
    spoil(folder, raw, OF_WEIGHTS)
    with refusals():
        checkpoint = open_checkpoint(folder)
        assert all(entry.file.parent == folder for entry in checkpoint.tensors.values())
        describe_model(checkpoint)
        assert len(FolderIdentity.of(checkpoint).fingerprint) == 32


@fuzzed("tokenizer_folders", files(*OF_TEXT), examples=12)
def test_a_tokenizer_makes_tokens_and_text_or_is_refused(raw: bytes, folder: Path) -> None:
    spoil(folder, raw, OF_TEXT)
    with refusals():
        read_sampling_defaults(folder).SerializeToString()
        text = load_text(folder)
        text.decode(text.encode("Once upon \0 hen", add_special_tokens=True), skip_special_tokens=True)
        chat = text.render_chat(CHAT, add_generation_prompt=True, continue_final_message=False, variables={})
        chat.text.encode(errors="replace")
        assert all(token >= 0 for token in chat.encode())
