"""A model folder is read by its headers; whatever is wrong with it has a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import write_mixtral

from moesaic.checkpoints.checkpoint import (
    INDEX_FILE,
    MISTRAL_INDEX_FILE,
    MISTRAL_SINGLE_FILE,
    SINGLE_FILE,
    open_checkpoint,
)
from moesaic.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and one small file of two tensors."""
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "sharded", max_shard_size=20_000)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A release of Mistral's, as far as a look at its headers goes."""
    folder = tmp_path / "native"
    folder.mkdir()
    params = {
        "dim": 8,
        "n_layers": 1,
        "hidden_dim": 8,
        "n_heads": 1,
        "n_kv_heads": 1,
        "norm_eps": 1,
        "vocab_size": 8,
    }
    (folder / "params.json").write_text(json.dumps(params))
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, folder / MISTRAL_SINGLE_FILE)
    return folder


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in caught.value.message
    assert str(folder) not in caught.value.message
    return caught.value


def write_raw(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_header(folder: Path, header: Any, data: bytes = b"") -> None:
    write_raw(folder, json.dumps(header).encode(), data)


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_single_file_gives_an_entry_for_every_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    a = checkpoint.tensors["a"]
    assert (a.name, a.file, a.dtype, a.shape, a.num_bytes) == ("a", folder / SINGLE_FILE, "F32", (2, 3), 24)
    assert (checkpoint.tensors["b"].dtype, checkpoint.tensors["b"].num_bytes) == ("BF16", 8)
    assert checkpoint.config == {"model_type": "mixtral"}


def test_shards_are_found_through_the_index(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    assert {name: tensor.file.name for name, tensor in checkpoint.tensors.items()} == weight_map


def test_a_folder_of_links_as_in_the_hub_cache_opens(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", SINGLE_FILE):
        (linked / name).symlink_to(folder / name)
    assert open_checkpoint(linked).tensors.keys() == {"a", "b"}


def test_an_unknown_folder_is_refused_as_the_model(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").field == "model"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no safetensors" in refusal(tmp_path).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_folder_of_pickles_is_told_that_only_safetensors_is_served(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    error = refusal(tmp_path)
    assert error.field == "model"
    assert "only safetensors" in error.message and name in error.message
    assert "`moesaic convert FOLDER OUT`" in error.message


def test_a_release_of_mistral_has_an_ordinary_config_beside_its_own_names(released: Path) -> None:
    checkpoint = open_checkpoint(released)
    assert checkpoint.in_mistral_format and checkpoint.config_file == "params.json"
    assert (checkpoint.config["model_type"], checkpoint.config["hidden_size"]) == ("mistral", 8)
    assert checkpoint.spelling["hidden_size"] == "dim"
    assert checkpoint.tensors.keys() == {"a", "b"}


def test_numbered_shards_of_a_release_are_read_with_or_without_an_index(released: Path) -> None:
    (released / MISTRAL_SINGLE_FILE).unlink()
    shards = [f"consolidated-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for shard, name in zip(shards, "ab", strict=True):
        save_file({name: torch.zeros(2)}, released / shard)
    assert {name: entry.file.name for name, entry in open_checkpoint(released).tensors.items()} == {
        "a": shards[0],
        "b": shards[1],
    }
    (released / MISTRAL_INDEX_FILE).write_text(json.dumps({"weight_map": {"b": shards[1]}}))
    assert open_checkpoint(released).tensors.keys() == {"b"}


def test_a_release_that_lacks_a_shard_is_refused(released: Path) -> None:
    (released / MISTRAL_SINGLE_FILE).rename(released / "consolidated-00001-of-00002.safetensors")
    assert "shards are missing" in refusal(released).message


def test_a_tensor_in_two_shards_of_a_release_is_refused(released: Path) -> None:
    (released / MISTRAL_SINGLE_FILE).unlink()
    for part in (1, 2):
        save_file({"a": torch.zeros(2)}, released / f"consolidated-0000{part}-of-00002.safetensors")
    error = refusal(released)
    assert error.field == "consolidated-00002-of-00002.safetensors"
    assert "tensor a " in error.message


def test_a_release_without_params_is_refused(released: Path) -> None:
    (released / "params.json").unlink()
    assert "params.json" in refusal(released).message


def test_broken_params_are_refused_by_name(released: Path) -> None:
    (released / "params.json").write_text("{")
    assert refusal(released).field == "params.json"
    (released / "params.json").write_text("{}")
    assert refusal(released).field == "params.json: dim"


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.00.pt"])
def test_a_release_that_has_pickles_beside_safetensors_is_refused(released: Path, name: str) -> None:
    (released / name).write_bytes(b"\x80\x04")
    error = refusal(released)
    assert error.field == "model"
    assert name in error.message and MISTRAL_SINGLE_FILE in error.message


def test_of_both_forms_side_by_side_that_of_hugging_face_is_read(folder: Path, released: Path) -> None:
    for path in released.iterdir():
        path.rename(folder / path.name)
    (folder / "config.json").write_text('{"model_type": "mixtral", "hidden_size": 8}')
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.in_mistral_format
    assert checkpoint.config["model_type"] == "mixtral"
    assert checkpoint.tensors["a"].file.name == SINGLE_FILE


@pytest.mark.parametrize(("key", "theirs"), [("hidden_size", "dim"), ("num_hidden_layers", "n_layers")])
def test_two_models_in_one_folder_are_refused(folder: Path, released: Path, key: str, theirs: str) -> None:
    for path in released.iterdir():
        path.rename(folder / path.name)
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", key: 9}))
    error = refusal(folder)
    assert error.field == f"params.json: {theirs}"
    assert "mixes two models" in error.message


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder).message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_broken_config_is_refused_by_name(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder).field == "config.json"


def test_a_truncated_file_is_refused_by_name(folder: Path) -> None:
    os.truncate(folder / SINGLE_FILE, (folder / SINGLE_FILE).stat().st_size - 1)
    error = refusal(folder)
    assert error.field == SINGLE_FILE
    assert "truncated" in error.message


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_a_file_cut_inside_its_header_is_refused(folder: Path, size: int) -> None:
    os.truncate(folder / SINGLE_FILE, size)
    assert "truncated" in refusal(folder).message


def test_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / SINGLE_FILE).open("ab") as file:
        file.write(b"x")
    assert "1 bytes follow" in refusal(folder).message


def test_a_header_over_the_limit_is_refused_unread(folder: Path) -> None:
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate((1 << 40) + 8)  # sparse: the length is true, and still too long
    assert "header exceeds" in refusal(folder).message


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": entry(0, 4, [1]) | {"more": 1}},
        {"a": entry(0, 4, [1], dtype="F31")},
        {"a": entry(0, 4, [1]) | {"dtype": ["F32"]}},
        {"a": entry(0, 4, [-1])},
        {"a": entry(0, 4, [True])},
        {"a": entry(0, 4, [1.0])},
        {"a": entry(0, 4, [1] * 9)},
        {"a": entry(0, 4, [2])},
        {"a": entry(4, 0, [1])},
        {"a": entry(0, 4, [1]) | {"data_offsets": [0]}},
        {"a": entry(0, 4, [1]) | {"data_offsets": ["0", "4"]}},
        {"a": entry(0, 4, [1]), "b": entry(0, 4, [1])},
        {"a": entry(0, 4, [1]), "b": entry(2, 6, [1])},
        {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
        {"a": entry(4, 8, [1])},
        {"": entry(0, 4, [1])},
        {"line\nbreak": entry(0, 4, [1])},
        {"long" * 200: entry(0, 4, [1])},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused_by_file_name(folder: Path, header: Any) -> None:
    write_header(folder, header, bytes(12))
    assert refusal(folder).field == SINGLE_FILE


@pytest.mark.parametrize(
    "text",
    [b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a":' * 50_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["cut", "no text", "nan", "deep", "long number"],
)
def test_a_header_that_is_no_json_object_is_refused(folder: Path, text: bytes) -> None:
    write_raw(folder, text)
    assert refusal(folder).field == SINGLE_FILE


def test_sizes_of_more_digits_than_a_message_can_show_are_refused(folder: Path) -> None:
    for header in ({"a": entry(0, 4, [10**4299, 10**4299])}, {"a": entry(0, 4 * 10**4299, [10**4299])}):
        write_header(folder, header, bytes(4))
        assert "below 2^63" in refusal(folder).message


def test_a_tensor_name_that_occurs_twice_is_refused(folder: Path) -> None:
    one = json.dumps(entry(0, 4, [1]))
    write_raw(folder, f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4))
    assert "twice" in refusal(folder).message


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    os.mkfifo(folder / SINGLE_FILE)
    assert "regular" in refusal(folder).message


def test_a_missing_shard_is_refused_by_its_name(sharded: Path) -> None:
    shard = sorted(path.name for path in sharded.glob("model-*.safetensors"))[1]
    (sharded / shard).unlink()
    error = refusal(sharded)
    assert error.field == shard
    assert "missing" in error.message


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(sharded: Path) -> None:
    shard = sorted(path.name for path in sharded.glob("model-*.safetensors"))[0]
    edit_index(sharded, **{"model.more.weight": shard})
    error = refusal(sharded)
    assert error.field == shard
    assert "model.more.weight" in error.message


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "config.json",
     "a\0.safetensors", ".safetensors"],
)  # fmt: skip
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, shard: str) -> None:
    edit_index(sharded, **{"model.norm.weight": shard})
    assert refusal(sharded).field == INDEX_FILE


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "x"]
)
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    assert refusal(sharded).field == INDEX_FILE


@given(cut=st.integers(0, 200), flip=st.integers(0, 199), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_no_change_to_a_file_raises_anything_but_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, folder / SINGLE_FILE)
    whole = bytearray((folder / SINGLE_FILE).read_bytes())
    whole[flip % len(whole)] = value
    (folder / SINGLE_FILE).write_bytes(whole[: max(0, len(whole) - cut)])
    try:
        tensors = open_checkpoint(folder).tensors.values()
    except CheckpointError:
        return
    assert sum(tensor.num_bytes for tensor in tensors) <= len(whole)


def test_reading_a_checkpoint_needs_no_torch(folder: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "from moesaic.checkpoints.checkpoint import open_checkpoint; import moesaic.families\n"
        f"print(len(open_checkpoint({str(folder)!r}).tensors))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert run.stdout.strip() == "2"
