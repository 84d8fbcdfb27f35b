"""A worker that is killed and comes back: by hand, with and without its model's folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_mixtral

from expert_worker.config import WorkerConfig
from expert_worker.experts.store import ExpertStore
from expert_worker.server import WorkerServer
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.compute.tensor_bytes import probe_layout
from moesaic.epoch import ExpertAddress
from moesaic.errors import CheckpointError
from moesaic.settings import WorkerSettings

pytestmark = pytest.mark.skipif(probe_layout() is None, reason="packed weights cannot be viewed here")

SHARE = frozenset(ExpertAddress(layer, slot) for layer in range(2) for slot in range(4))


def config(
    model: Path, place: Path, *, identity: FolderIdentity | None = None, keep: str = "auto"
) -> WorkerConfig:
    settings = WorkerSettings.model_validate({"keep_weights": keep, "keep_weights_in": str(place)})
    return WorkerConfig("w", model, SHARE, "127.0.0.1", 0, "cpu", "auto", settings, identity=identity)


def run_and_kill(model: Path, place: Path) -> None:
    """A worker by hand, which is killed once it serves."""
    command = (sys.executable, "-m", "expert_worker", "--model", str(model), "--keep-weights-in", str(place))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
        finally:
            process.send_signal(signal.SIGKILL)


async def experts_of(config: WorkerConfig) -> dict[ExpertAddress, torch.Tensor]:
    """What each expert of a new worker makes of the same rows; the worker is ended again."""
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    server = WorkerServer(config)
    await server.start()
    try:
        await server.load()
        store = server._served
        assert isinstance(store, ExpertStore)
        return {version.address: expert(rows) for version, expert in store.experts().items()}
    finally:
        await server.stop(0)


async def test_a_killed_worker_comes_back_without_its_models_folder(tmp_path: Path) -> None:
    model, place = write_mixtral(tmp_path / "model"), tmp_path / "memory"
    place.mkdir()
    identity = FolderIdentity.of(open_checkpoint(model))
    expected = await experts_of(config(model, place, keep="off"))
    run_and_kill(model, place)
    model.rename(tmp_path / "elsewhere")
    found = await experts_of(config(model, place, identity=identity))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[address], expected[address]) for address in expected)
    # It ended cleanly, and took over what the killed one had left: nothing remains, so that the next one must read.
    assert not [path for path in place.rglob("*") if path.is_file()]
    with pytest.raises(CheckpointError, match="no such folder"):
        await experts_of(config(model, place, identity=identity))


async def test_a_worker_by_hand_does_not_serve_the_weights_of_another_training(tmp_path: Path) -> None:
    model, place = write_mixtral(tmp_path / "model"), tmp_path / "memory"
    place.mkdir()
    run_and_kill(model, place)
    model.rename(tmp_path / "elsewhere")
    write_mixtral(model, seed=5)
    found = await experts_of(config(model, place))
    expected = await experts_of(config(model, place, keep="off"))
    assert all(torch.equal(found[address], expected[address]) for address in expected)


async def test_with_the_setting_off_nothing_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "memory"
    place.mkdir()
    await experts_of(config(write_mixtral(tmp_path / "model"), place, keep="off"))
    assert not list(place.iterdir())
