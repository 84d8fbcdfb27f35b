from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bundles import make_bundle
from support.checkpoints import write_mixtral

from moesaic.bundles import BaseModel, Bundle
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.families import describe_model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(base_folder: Path) -> BaseModel:
    checkpoint = open_checkpoint(base_folder)
    return BaseModel(FolderIdentity.of(checkpoint).fingerprint, describe_model(checkpoint))


@pytest.fixture
def bundle(tmp_path: Path, base_folder: Path) -> Bundle:
    """Two new slots, with gate rows."""
    return make_bundle(tmp_path / "maths-v1", base_folder, ((0, None), (1, None)))


@pytest.fixture
def rewritten(bundle: Bundle) -> Callable[[Callable[[dict], object]], Path]:  # type: ignore[type-arg]
    """Changes the bundle's manifest in place; its folder."""

    def rewrite(change: Callable[[dict], object]) -> Path:  # type: ignore[type-arg]
        values = json.loads(bundle.manifest_bytes)
        change(values)
        (bundle.folder / "manifest.json").write_text(json.dumps(values))
        return bundle.folder

    return rewrite
