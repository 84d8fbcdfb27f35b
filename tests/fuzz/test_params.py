"""params.json, the config of Mistral's own releases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fuzzing import fuzzed, refusals
from support.mutations import bytes_near, json_near

from moesaic.checkpoints.checkpoint import open_checkpoint

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "hidden_dim": 24,
    "vocab_size": 96,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": [16, None],
    "moe": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Mistral's own layout, with no tensors."""
    folder = tmp_path_factory.mktemp("params")
    (folder / "consolidated.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@fuzzed("params", json_near(PARAMS) | bytes_near(json_near(PARAMS)), examples=80)
def test_params_are_translated_or_refused(raw: bytes, folder: Path) -> None:
    (folder / "params.json").write_bytes(raw)
    with refusals():
        json.dumps(dict(open_checkpoint(folder).config), allow_nan=False)
