"""Experts in shared memory: the same bits, found by version and form, refused where they are damaged."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_mixtral

from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.kept import experts as experts_module
from expert_worker.experts.kept.experts import KeptExperts
from expert_worker.experts.loader import load_experts
from expert_worker.experts.store import HeldExpert
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.compute.linear import WeightForm
from moesaic.compute.tensor_bytes import probe_layout
from moesaic.epoch import ExpertAddress
from moesaic.families import describe_model
from moesaic.kept_folder import KeptFolder

pytestmark = pytest.mark.skipif(probe_layout() is None, reason="packed weights cannot be viewed here")

FORM = ExpertForm(torch.device("cpu"), torch.float32)
ADDRESS = ExpertAddress(0, 1)
Held = dict[ExpertAddress, HeldExpert]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes that every form can have."""
    return write_mixtral(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=96)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[KeptFolder]:
    folder = KeptFolder.open(tmp_path)
    yield folder
    folder.close()


def load(model: Path, kept: KeptExperts | None, form: ExpertForm = FORM) -> Held:
    checkpoint = open_checkpoint(model)
    addresses = [ExpertAddress(0, slot) for slot in range(3)]
    return dict(load_experts(checkpoint, describe_model(checkpoint), addresses, form, kept=kept))


def successor(held: Held, place: Path, form: ExpertForm = FORM) -> KeptExperts:
    return KeptExperts(KeptFolder.open(place), form, {address: one.version for address, one in held.items()})


def the_file(place: Path, version: bytes) -> Path:
    (path,) = place.glob(f"*/pool/{version.hex()}.*")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float", "int8", "int4"])
def test_mapped_experts_compute_the_bits_of_loaded_ones(
    wide: Path, folder: KeptFolder, tmp_path: Path, weights: WeightForm, dtype: torch.dtype
) -> None:
    form = replace(FORM, weights=weights, dtype=dtype)
    plain, first = load(wide, None, form), load(wide, KeptExperts(folder, form), form)
    later = successor(first, tmp_path, form)
    rows = torch.randn(7, 64)
    for address, held in plain.items():
        found = later.find_base(address)
        assert found is not None
        assert found.version == held.version == first[address].version
        for one in (found.expert, first[address].expert):
            assert torch.equal(one(rows), held.expert(rows))
            assert (one.num_bytes, one.dtype) == (held.expert.num_bytes, held.expert.dtype)
    assert later.found == 3
    later.folder.close()


def test_another_form_or_another_torch_finds_nothing(
    wide: Path, folder: KeptFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = load(wide, KeptExperts(folder, FORM))
    version = held[ADDRESS].version
    for form in (replace(FORM, dtype=torch.bfloat16), replace(FORM, weights="int8")):
        assert KeptExperts(folder, form).find(version) is None
    assert KeptExperts(folder, FORM).find(version) is not None
    monkeypatch.setattr(experts_module.torch, "__version__", "9.9")
    assert KeptExperts(folder, FORM).find(version) is None


@pytest.mark.parametrize("damage", ["header", "magic", "short", "empty", "open to others", "renamed"])
def test_a_damaged_file_is_refused_and_made_again(
    wide: Path, folder: KeptFolder, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    held = load(wide, KeptExperts(folder, FORM))
    later = successor(held, tmp_path)
    path = the_file(tmp_path, held[ADDRESS].version)
    # Another file takes the name: what is mapped cannot be changed.
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[60] ^= 1
    elif damage == "magic":
        content[0] ^= 1
    elif damage == "renamed":
        content = bytearray(the_file(tmp_path, held[ExpertAddress(0, 2)].version).read_bytes())
    path.unlink()
    path.write_bytes({"short": content[:-4096], "empty": b""}.get(damage, content))
    path.chmod(0o444 | 0o022 if damage == "open to others" else 0o400)
    assert later.find_base(ADDRESS) is None
    assert "of no use" in caplog.text
    again = load(wide, later)[ADDRESS]
    rows = torch.randn(3, 64)
    assert torch.equal(again.expert(rows), held[ADDRESS].expert(rows))
    assert later.find(again.version) is not None
    later.folder.close()


def test_without_room_experts_stay_in_plain_memory_and_one_line_says_so(
    wide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = KeptFolder.open(tmp_path, max_bytes=1000)
    with caplog.at_level(logging.WARNING):
        held = load(wide, KeptExperts(folder, FORM))
    assert [record.message for record in caplog.records if "no room" in record.message] == [
        "no room to keep weights beyond this process, so its successor will read some from the disk"
    ]
    rows = torch.randn(3, 64)
    assert torch.equal(held[ADDRESS].expert(rows), load(wide, None)[ADDRESS].expert(rows))
    folder.close()


def test_replicas_map_the_very_same_pages(wide: Path, folder: KeptFolder, tmp_path: Path) -> None:
    held = load(wide, KeptExperts(folder, FORM))
    other = KeptExperts(KeptFolder.open(tmp_path), FORM)
    again = load(wide, other)  # it knows no versions, reads, and finds that they are there
    path = the_file(tmp_path, held[ADDRESS].version)
    assert path.stat().st_nlink == 3
    assert len({file.stat().st_ino for file in tmp_path.rglob(path.name)}) == 1
    del again
    other.folder.close()
    assert path.stat().st_nlink == 2


def mapped(place: Path, version: bytes) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(place) in line and version.hex() in line for line in lines)


def test_a_version_that_is_given_up_returns_its_memory(
    wide: Path, folder: KeptFolder, tmp_path: Path
) -> None:
    kept = KeptExperts(folder, FORM)
    held = load(wide, kept)
    version = held[ADDRESS].version
    assert mapped(tmp_path, version) == 1
    del held
    kept.drop(version)
    gc.collect()
    assert mapped(tmp_path, version) == 0
    assert not list(tmp_path.rglob(f"{version.hex()}*"))
