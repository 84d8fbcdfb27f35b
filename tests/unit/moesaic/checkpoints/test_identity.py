"""Two folders are the same model or not, whatever their sizes say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import write_mixtral

from moesaic.checkpoints.checkpoint import SINGLE_FILE, open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity, check_identity
from moesaic.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "first")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))


def identity(folder: Path) -> FolderIdentity:
    return FolderIdentity.of(open_checkpoint(folder))


def refusal(folder: Path, wanted: Path, *, text: bool = False) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_identity(open_checkpoint(folder), identity(wanted), text=text)
    assert (refused.value.field, refused.value.reason) == ("model", "OTHER_MODEL")
    return refused.value.message


def test_a_copy_elsewhere_is_the_same_model(folder: Path, copy: Path) -> None:
    assert identity(copy) == identity(folder)
    check_identity(open_checkpoint(copy), identity(folder), text=True)


def test_weights_of_the_same_shapes_and_sizes_are_another_model(folder: Path, copy: Path) -> None:
    tensors = load_file(copy / SINGLE_FILE)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor.neg_()
    save_file(tensors, copy / SINGLE_FILE, metadata={"format": "pt"})
    assert (copy / SINGLE_FILE).stat().st_size == (folder / SINGLE_FILE).stat().st_size
    assert refusal(copy, folder).endswith("they differ in weights")


def test_one_tensor_of_another_training_is_enough(folder: Path, copy: Path) -> None:
    tensors = load_file(copy / SINGLE_FILE)
    tensors["model.layers.1.self_attn.q_proj.weight"].add_(0.125)
    save_file(tensors, copy / SINGLE_FILE, metadata={"format": "pt"})
    assert "weights" in refusal(copy, folder)


def test_another_config_is_another_model(folder: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert refusal(copy, folder).endswith("they differ in config")


def test_another_layout_of_the_same_config_is_no_difference(folder: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config, indent=7, sort_keys=True))
    assert identity(copy) == identity(folder)


def test_the_same_tensors_in_other_files_are_another_folder(folder: Path, tmp_path: Path) -> None:
    sharded = write_mixtral(tmp_path / "sharded", max_shard_size=20_000)
    assert "tensors" in refusal(sharded, folder)


def test_another_chat_template_matters_to_those_who_read_text_alone(folder: Path, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    check_identity(open_checkpoint(copy), identity(folder))
    assert refusal(copy, folder, text=True).endswith("they differ in text")


def test_without_a_stated_identity_every_folder_will_do(folder: Path) -> None:
    check_identity(open_checkpoint(folder), None)
