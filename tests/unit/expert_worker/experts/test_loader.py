"""Only the worker's own slices are read, several experts at a time; the same weights have the same version in every layout."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import Layout, write_mixtral
from support.expert_calls import ReferenceExperts
from torch import Tensor

from expert_worker.experts import loader
from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.loader import load_experts
from expert_worker.experts.store import HeldExpert
from moesaic.checkpoints.checkpoint import SINGLE_FILE, open_checkpoint
from moesaic.compute.linear import Linear
from moesaic.epoch import ExpertAddress
from moesaic.errors import CheckpointError, Unavailable
from moesaic.families import describe_model

ALL = [ExpertAddress(layer, slot) for layer in range(2) for slot in range(4)]


CPU = torch.device("cpu")
FLOAT32 = ExpertForm(CPU, torch.float32)


def load(
    folder: Path, addresses: list[ExpertAddress], form: ExpertForm = FLOAT32
) -> dict[ExpertAddress, HeldExpert]:
    checkpoint = open_checkpoint(folder)
    return dict(load_experts(checkpoint, describe_model(checkpoint), addresses, form))


def weight_of(linear: Linear) -> Tensor:
    """The matrix that it multiplies by, in whatever layout it lies: every row of the identity picks a column."""
    return linear(torch.eye(linear.in_features)).T


def mapped_files() -> list[str]:
    return [
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if ".safetensors" in line
    ]


@pytest.mark.parametrize("layout", ["classic", "fused"])
def test_an_expert_holds_the_very_weights_of_the_checkpoint(tmp_path: Path, layout: Layout) -> None:
    write_mixtral(tmp_path, layout=layout, max_shard_size=20_000)
    reference = ReferenceExperts(tmp_path)
    for (layer, slot), held in load(tmp_path, [ExpertAddress(1, 2), ExpertAddress(0, 3)]).items():
        gate, up = weight_of(held.expert.up).chunk(2)
        for name, weight in (("gate", gate), ("up", up), ("down", weight_of(held.expert.down))):
            assert torch.equal(weight, reference.weight(layer, slot, name))


def test_both_layouts_and_any_sharding_give_the_same_versions(tmp_path: Path) -> None:
    folders = [
        write_mixtral(tmp_path / "classic"),
        write_mixtral(tmp_path / "fused", layout="fused"),
        write_mixtral(tmp_path / "shards", max_shard_size=20_000),
    ]
    versions = [{address: held.version for address, held in load(folder, ALL).items()} for folder in folders]
    assert versions[0] == versions[1] == versions[2]
    assert len(set(versions[0].values())) == len(ALL)


def test_other_weights_and_another_dtype_are_other_versions(tmp_path: Path) -> None:
    address = [ExpertAddress(0, 0)]
    folders = [
        write_mixtral(tmp_path / "a"),
        write_mixtral(tmp_path / "b", seed=1),
        write_mixtral(tmp_path / "c", dtype=torch.bfloat16),
        write_mixtral(tmp_path / "d", dtype=torch.float16),
    ]
    assert len({load(folder, address)[address[0]].version for folder in folders}) == 4


def test_the_version_is_that_of_the_file_and_not_of_the_compute_dtype(tmp_path: Path) -> None:
    write_mixtral(tmp_path, dtype=torch.bfloat16)
    address = ExpertAddress(0, 0)
    wide, narrow = (
        load(tmp_path, [address], ExpertForm(CPU, dtype))[address]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.version == narrow.version
    assert (wide.expert.dtype, narrow.expert.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(weight_of(wide.expert.down), weight_of(narrow.expert.down).float())


def test_quantised_experts_keep_their_version_and_take_less_memory(tmp_path: Path) -> None:
    write_mixtral(tmp_path, dtype=torch.bfloat16, intermediate_size=64)
    address = ExpertAddress(0, 0)
    plain, eight, four = (
        load(tmp_path, [address], ExpertForm(CPU, torch.float32, weights))[address]
        for weights in ("float", "int8", "int4")
    )
    assert plain.version == eight.version == four.version
    num_weights = 3 * 32 * 64
    assert plain.expert.num_bytes == 4 * num_weights
    assert eight.expert.num_bytes == num_weights + 4 * (2 * 64 + 32)
    assert four.expert.num_bytes == num_weights // 2 + 4 * num_weights // 32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
def test_weights_that_are_not_finite_are_refused_by_tensor(tmp_path: Path, weight: str, bad: float) -> None:
    name = f"model.layers.1.block_sparse_moe.experts.2.{weight}.weight"
    write_mixtral(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors[name][3, 5] = bad
    save_file(tensors, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, [ExpertAddress(1, 2)])
    assert caught.value.field == name
    assert load(tmp_path, [ExpertAddress(1, 1)])  # what another worker holds is not this one's concern


def test_a_file_that_vanished_after_the_check_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_mixtral(tmp_path))
    model = describe_model(checkpoint)
    (tmp_path / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError) as caught:
        list(load_experts(checkpoint, model, ALL, FLOAT32))
    assert caught.value.field == SINGLE_FILE


def test_no_file_stays_mapped(tmp_path: Path) -> None:
    held = load(write_mixtral(tmp_path), ALL)
    assert len(held) == len(ALL)
    assert not [name for name in mapped_files() if str(tmp_path) in name]


def test_experts_come_in_the_order_of_layer_and_slot(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_mixtral(tmp_path))
    loading = load_experts(checkpoint, describe_model(checkpoint), reversed(ALL), FLOAT32)
    assert [address for address, _ in loading] == ALL


@pytest.mark.shared
def test_the_reference_layouts_give_the_same_versions(shared: Path) -> None:
    addresses = [ExpertAddress(layer, slot) for layer in range(2) for slot in range(8)]
    classic, fused = (
        load(shared / "goldens" / "mixtral" / name, addresses) for name in ("hf_v4", "hf_v5_fused")
    )
    assert {a: held.version for a, held in classic.items()} == {a: held.version for a, held in fused.items()}
    for address in addresses:
        one, other = classic[address].expert, fused[address].expert
        assert torch.equal(weight_of(one.up), weight_of(other.up))


def test_a_file_that_shrinks_after_the_check_is_refused_by_name(tmp_path: Path) -> None:
    """And is not the end of the process, as it would be of one that had mapped the file."""
    checkpoint = open_checkpoint(write_mixtral(tmp_path))
    model = describe_model(checkpoint)
    os.truncate(tmp_path / SINGLE_FILE, 20_000)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        list(load_experts(checkpoint, model, ALL, FLOAT32))
    assert caught.value.field == SINGLE_FILE


class Watch:
    """Sees how many experts are begun and how many threads are at it, and can hold them up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, threads: int) -> None:
        self.begun = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()
        self._load = loader.ExpertLoader.load
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(loader.ExpertLoader, "load", lambda *args: self.load(*args))

    def load(self, *args: Any) -> HeldExpert:
        with self._lock:
            self.begun += 1
        assert self.go_on.wait(60)
        return self._load(*args)


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_experts_are_under_way_than_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    watch = Watch(monkeypatch, threads=threads)
    checkpoint = open_checkpoint(write_mixtral(tmp_path))
    loading = load_experts(checkpoint, describe_model(checkpoint), ALL, FLOAT32)
    for given, (address, _) in enumerate(loading, 1):
        assert address == ALL[given - 1]
        assert watch.begun <= given + threads
    assert watch.begun == len(ALL)


def test_several_threads_give_the_experts_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mixtral(tmp_path)
    loaded = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        loaded.append(load(tmp_path, ALL))
    for address in ALL:
        one, other = (held[address] for held in loaded)
        assert one.version == other.version
        assert torch.equal(weight_of(one.expert.up), weight_of(other.expert.up))
        assert torch.equal(weight_of(one.expert.down), weight_of(other.expert.down))


def test_a_stop_ends_the_loading_in_the_middle_of_an_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, stopping = Watch(monkeypatch, threads=2), threading.Event()
    checkpoint = open_checkpoint(write_mixtral(tmp_path))
    loading = load_experts(checkpoint, describe_model(checkpoint), ALL, FLOAT32, stopping=stopping)
    next(loading)
    stopping.set()
    with pytest.raises(Unavailable):
        list(loading)
    assert watch.begun < len(ALL)
    assert not loading_threads()


def test_whoever_wants_no_more_experts_leaves_no_thread_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch, threads=2)
    checkpoint = open_checkpoint(write_mixtral(tmp_path))
    loading = load_experts(checkpoint, describe_model(checkpoint), ALL, FLOAT32)
    next(loading)
    loading.close()
    assert watch.begun <= 3
    assert not loading_threads()


def loading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expert-load")]
