"""Where a model's folder comes from."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from cluster.checkpoints.model_source import find_model, name_model
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


@pytest.mark.parametrize(
    ("published", "fetched"),
    [
        (
            ["config.json", "model.safetensors", "params.json", "consolidated.safetensors", "model.py"],
            {"config.json", "model.safetensors", "params.json"},
        ),
        (["params.json", "consolidated.safetensors", "x.bin"], {"params.json", "consolidated.safetensors"}),
    ],
)
def test_weights_that_a_repository_holds_twice_are_fetched_once(
    published: list[str], fetched: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(name: str, *, allow_patterns: str | list[str]) -> str:
        for file in filter_repo_objects(published, allow_patterns=allow_patterns):
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert {path.name for path in find_model("hf://tiny/mixtral").iterdir()} == fetched


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
