"""A bundle's folder: what is written is what is read, and nothing but the files of the format is."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.bundles import make_bundle, random_weights

from moesaic.bundles import BaseModel, Bundle, TensorSource, open_bundle, write_bundle
from moesaic.errors import InvalidArgument
from moesaic.families.model import ExpertModule


def reason_of(folder: Path) -> str:
    with pytest.raises(InvalidArgument) as refused:
        open_bundle(folder)
    assert refused.value.field == "bundle"
    return refused.value.reason


def test_the_digest_is_that_of_the_manifest_as_it_is(bundle: Bundle) -> None:
    assert bundle.digest == hashlib.sha256((bundle.folder / "manifest.json").read_bytes()).digest()


def test_other_programs_read_the_weights(bundle: Bundle) -> None:
    tensors = load_file(bundle.weights_file)
    assert tensors.keys() == bundle.tensors.keys()
    for name, values in tensors.items():
        assert np.array_equal(bundle.floats(name), values)


def test_bfloat16_is_read_as_float32(tmp_path: Path, bundle: Bundle) -> None:
    values = torch.tensor([1.5, -3e20, 0.0]).bfloat16()
    data = values.view(torch.uint8).numpy().tobytes()
    name = "layers.bf16"
    source = TensorSource("BF16", (3,), lambda: iter((data,)))
    written = write_bundle(
        tmp_path / "other",
        bundle.manifest,
        {**_sources(bundle), name: source},
    )
    assert np.array_equal(written.floats(name), values.float().numpy())


def test_a_bundle_appears_whole_or_not_at_all(tmp_path: Path, bundle: Bundle) -> None:
    def fails() -> object:
        yield b"1234"
        raise OSError("the disk is full")

    source = TensorSource("F32", (8,), fails)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="disk is full"):
        write_bundle(tmp_path / "half", bundle.manifest, {"a": source})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maths-v1"]


def test_an_existing_folder_is_not_written_over(bundle: Bundle) -> None:
    with pytest.raises(InvalidArgument, match="there already") as refused:
        write_bundle(bundle.folder, bundle.manifest, {})
    assert refused.value.field == "out"


def test_the_same_weights_have_the_same_version_in_any_bundle(
    tmp_path: Path, base_folder: Path, base: BaseModel
) -> None:
    module: ExpertModule = base.model.experts[0].module
    weights = random_weights(module, 7)
    swap = make_bundle(tmp_path / "a", base_folder, ((0, 1),), weights={(0, 1): weights})
    add = make_bundle(tmp_path / "b", base_folder, ((0, None),), weights={(0, None): weights})
    assert swap.manifest.experts[0].version == add.manifest.experts[0].version


def test_a_model_folder_gets_the_sentence_that_helps(base_folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="moesaic expert pack") as refused:
        open_bundle(base_folder)
    assert refused.value.reason == "BUNDLE_NOT_A_BUNDLE"


def test_an_adapter_is_told_from_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidArgument, match="adapter"):
        open_bundle(tmp_path)


def test_no_folder_is_no_bundle(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "nowhere") == "BUNDLE_NOT_A_BUNDLE"


def test_a_bundle_needs_its_weights(bundle: Bundle) -> None:
    bundle.weights_file.unlink()
    assert reason_of(bundle.folder) == "BUNDLE_NOT_A_BUNDLE"


def test_a_truncated_file_is_refused(bundle: Bundle) -> None:
    os.truncate(bundle.weights_file, bundle.num_bytes - 1)
    assert reason_of(bundle.folder) == "BUNDLE_WEIGHTS"


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_refused_unread(bundle: Bundle, protocol: int) -> None:
    bundle.weights_file.write_bytes(pickle.dumps({"gate": [1.0]}, protocol=protocol))
    assert reason_of(bundle.folder) == "BUNDLE_PICKLE"


def test_the_zip_of_torch_is_refused_unread(bundle: Bundle) -> None:
    torch.save({"gate": torch.zeros(2)}, bundle.weights_file)
    assert reason_of(bundle.folder) == "BUNDLE_PICKLE"


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_link_is_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    (bundle.folder / name).rename(target)
    (bundle.folder / name).symlink_to(target)
    assert reason_of(bundle.folder) == "BUNDLE_FILES"


def test_another_file_is_refused(bundle: Bundle) -> None:
    (bundle.folder / "setup.py").write_text("print('hello')")
    assert reason_of(bundle.folder) == "BUNDLE_FILES"


def test_an_endless_manifest_is_refused_unread(bundle: Bundle) -> None:
    os.truncate(bundle.folder / "manifest.json", 1 << 30)
    assert reason_of(bundle.folder) == "BUNDLE_FILES"


def _sources(bundle: Bundle) -> dict[str, TensorSource]:
    return {name: TensorSource.of(bundle.floats(name)) for name in bundle.tensors}
