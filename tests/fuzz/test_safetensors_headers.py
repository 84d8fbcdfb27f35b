"""Files of weights: their headers are read before any library opens them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st
from support.fuzzing import fuzzed, refusals
from support.mutations import bytes_near, json_near

from moesaic.checkpoints.safetensors_file import read_header

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def file_of(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(32)


VALID = file_of(json.dumps(HEADER).encode())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@fuzzed("safetensors_headers", bytes_near(json_near(HEADER).map(file_of) | st.just(VALID)), examples=150)
def test_a_file_of_weights_is_within_its_size_or_refused(raw: bytes, file: Path) -> None:
    file.write_bytes(raw)
    with refusals():
        for entry in read_header(file).values():
            assert entry.first_byte + entry.num_bytes <= len(raw)
