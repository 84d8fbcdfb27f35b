"""Where a model's folder comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.model_source import find_model, name_model
from moesaic.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache layout, and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_path_is_taken_as_it_is_even_if_it_looks_like_a_hub_name() -> None:
    assert find_model("mistralai/Mixtral-8x7B-v0.1") == Path("mistralai/Mixtral-8x7B-v0.1")


def test_a_hub_name_is_found_in_the_local_cache(offline_cache: Path) -> None:
    repository = offline_cache / "models--tiny--mixtral"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert find_model("hf://tiny/mixtral") == snapshot


@pytest.mark.parametrize("source", ["hf://tiny/absent", "hf://not a name", "hf://"])
def test_what_cannot_be_had_is_an_error_of_the_model(source: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        find_model(source)
    assert refused.value.field == "model"


@pytest.mark.parametrize(
    ("source", "name"), [("hf://tiny/mixtral", "tiny/mixtral"), ("/models/tiny/", "tiny"), ("models/a", "a")]
)
def test_a_model_is_called_by_its_hub_name_or_its_folder(source: str, name: str) -> None:
    assert name_model(source) == name
