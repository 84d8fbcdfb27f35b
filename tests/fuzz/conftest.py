"""A tiny model folder, for the targets that need one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import write_mixtral

from expert_worker.experts.expert import ExpertForm
from expert_worker.experts.loader import load_experts
from expert_worker.experts.store import ExpertStore
from expert_worker.serving.call_handler import CallHandler
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.families import describe_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts, D 32, F 24."""
    return write_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def store(folder: Path) -> ExpertStore:
    """Slots 0 to 2 of both layers."""
    checkpoint, store = open_checkpoint(folder), ExpertStore()
    addresses = [ExpertAddress(layer, slot) for layer in range(2) for slot in range(3)]
    form = ExpertForm(torch.device("cpu"), torch.float32)
    for address, held in load_experts(checkpoint, describe_model(checkpoint), addresses, form):
        store.add(address, held)
    return store


@pytest.fixture(scope="session")
def handler(folder: Path, store: ExpertStore) -> CallHandler:
    """What every transport of a worker gives its calls to."""
    handler = CallHandler(worker="w", max_call_rows=64)
    handler.open(describe_model(open_checkpoint(folder)), store)
    return handler
