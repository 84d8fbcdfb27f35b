"""A tiny model whose experts the tests compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import write_mixtral

from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.loader import load_experts
from expert_worker.experts.store import ExpertStore
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.families import MoeModel, describe_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts, D 32, F 24."""
    return write_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(folder: Path) -> MoeModel:
    return describe_model(open_checkpoint(folder))


@pytest.fixture(scope="session")
def store(folder: Path, model: MoeModel) -> ExpertStore:
    """Slots 0 to 2 of both layers: slot 3 is another worker's."""
    store = ExpertStore()
    addresses = [ExpertAddress(layer, slot) for layer in range(2) for slot in range(3)]
    for address, held in load_experts(
        open_checkpoint(folder), model, addresses, ExpertForm(torch.device("cpu"), torch.float32)
    ):
        store.add(address, held)
    return store
