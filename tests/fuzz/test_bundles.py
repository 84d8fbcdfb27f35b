"""Expert bundles as folders: a manifest, and the file of weights that it speaks of.

An input is the length of the manifest in four bytes, the manifest, and the file of weights.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.fuzzing import fuzzed, refusals
from support.mutations import bytes_near, json_near

from moesaic.bundles import BaseModel, open_bundle, verify
from moesaic.bundles.gate_row import effective_row
from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import FolderIdentity
from moesaic.families import describe_model


@cache
def valid() -> tuple[BaseModel, dict[str, Any], bytes]:
    """A model, and the manifest and weights of a bundle that adds a slot to it."""
    with tempfile.TemporaryDirectory() as there:
        folder = write_mixtral(Path(there) / "base")
        bundle = make_bundle(Path(there) / "maths-v1", folder)
        checkpoint = open_checkpoint(folder)
        base = BaseModel(FolderIdentity.of(checkpoint).fingerprint, describe_model(checkpoint))
        return base, json.loads(bundle.manifest_bytes), bundle.weights_file.read_bytes()


def manifests() -> st.SearchStrategy[bytes]:
    return st.deferred(lambda: json_near(valid()[1]))


def weights() -> st.SearchStrategy[bytes]:
    return st.deferred(lambda: st.just(valid()[2]))


def join(manifest: bytes, weights: bytes) -> bytes:
    return len(manifest).to_bytes(4, "little") + manifest + weights


INPUTS = st.builds(join, manifests(), weights()) | st.builds(
    join, manifests() | bytes_near(manifests()), weights() | bytes_near(weights())
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundle")


@fuzzed("bundles", INPUTS, examples=100)
def test_a_bundle_is_right_to_its_last_byte_or_refused(raw: bytes, place: Path) -> None:
    end = 4 + int.from_bytes(raw[:4], "little")
    (place / "manifest.json").write_bytes(raw[4:end])
    (place / "weights.safetensors").write_bytes(raw[end:])
    with refusals():
        bundle = open_bundle(place)
        verify(bundle, base=valid()[0])
        for expert in bundle.manifest.experts:
            if expert.gate_row is not None:
                effective_row(bundle, expert.gate_row)
