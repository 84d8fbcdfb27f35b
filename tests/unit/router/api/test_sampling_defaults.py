"""What generation_config.json sets for requests that leave it open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from moesaic.errors import CheckpointError
from moesaic.v1 import inference_pb2
from router.api.sampling_defaults import completed, neutral_sampling, read_sampling_defaults


def written(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_the_files_values_are_the_defaults(tmp_path: Path) -> None:
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.3
    )
    config.save_pretrained(tmp_path)
    assert read_sampling_defaults(tmp_path) == inference_pb2.SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.3
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "temperature": None, "top_k": None, "max_length": 20}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0, "top_p": 0.9}),
        ({"do_sample": True}, {}),
        ({"temperature": 0, "top_p": 0}, {"temperature": 0, "top_p": 0}),
        ({"top_k": -1}, {}),
        ({"temperature": 1}, {}),
    ],
)
def test_what_the_file_leaves_open_is_neutral(
    tmp_path: Path, content: dict[str, Any], expected: dict[str, float]
) -> None:
    defaults = read_sampling_defaults(written(tmp_path, content))
    assert defaults == completed(inference_pb2.SamplingParams(**expected), neutral_sampling())


def test_a_folder_without_the_file_is_neutral(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == neutral_sampling()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 10**400),
        ("temperature", 1e39),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("top_k", 1.5),
        ("top_k", 2**40),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
    ],
)
def test_a_value_that_no_request_may_have_is_refused_with_a_way_out(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match="--generation-config none") as caught:
        read_sampling_defaults(written(tmp_path, {name: value}))
    assert caught.value.field == name


@pytest.mark.parametrize("content", ["[]", "{", '{"temperature": NaN}'])
def test_a_file_that_is_no_object_of_numbers_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_sampling_defaults(tmp_path)
