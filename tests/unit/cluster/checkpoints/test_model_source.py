"""Where a model's folder comes from."""

from __future__ import annotations

import errno
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, hf_raise_for_status
from huggingface_hub.utils._http import httpx2 as httpx

from cluster.checkpoints.model_source import find_here, find_model, name_model
from moesaic.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache layout, and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_path_is_taken_as_it_is_even_if_it_looks_like_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mistralai" / "Mixtral-8x7B-v0.1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
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
    def hub(name: str, *, revision: str | None, allow_patterns: str | list[str]) -> str:
        for file in filter_repo_objects(published, allow_patterns=allow_patterns):
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert {path.name for path in find_model("hf://tiny/mixtral").iterdir()} == fetched


def test_a_node_that_has_the_folder_asks_nobody(tmp_path: Path) -> None:
    assert find_here(tmp_path, "hf://tiny/mixtral") == tmp_path


def test_a_folder_that_a_node_lacks_is_told_by_whoever_reads_it(tmp_path: Path) -> None:
    assert find_here(tmp_path / "absent", None) == tmp_path / "absent"


def test_a_node_without_the_folder_gets_the_same_revision_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def hub(name: str, *, revision: str | None, allow_patterns: str | list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    elsewhere = Path("/cache/of/another/machine/snapshots") / COMMIT
    assert find_here(elsewhere, "hf://tiny/mixtral") == tmp_path
    assert set(asked) == {("tiny/mixtral", COMMIT)}


def test_a_node_that_the_hub_does_not_serve_says_which_model_it_lacks() -> None:
    with pytest.raises(
        CheckpointError,
        match="hf://tiny/mixtral is not on this node: it is not whole in the local cache, and HF_HUB_OFFLINE",
    ):
        find_here(Path("/cache/of/another/machine/snapshots") / COMMIT, "hf://tiny/mixtral")


@pytest.mark.parametrize("source", ["hf://tiny/absent", "hf://not a name", "hf://"])
def test_what_cannot_be_had_is_an_error_of_the_model(source: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        find_model(source)
    assert refused.value.field == "model"


def answer(status: int, **headers: str) -> Exception:
    """The error that the hub's library makes of an answer."""
    url = "https://huggingface.co/api/models/tiny/absent/revision/main"
    response = httpx.Response(status, headers=headers, request=httpx.Request("GET", url))
    with pytest.raises(HfHubHTTPError) as raised:
        hf_raise_for_status(response)
    return raised.value


def uncached(cause: Exception | None) -> Exception:
    error = LocalEntryNotFoundError("nothing is here")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (answer(403, **{"X-Error-Code": "GatedRepo"}), "the model is gated: accept its terms at https://"),
        (answer(404, **{"X-Error-Code": "RepoNotFound"}), "the hub has no such model, or it is private"),
        (
            answer(401, **{"X-Error-Message": "Invalid credentials in Authorization header"}),
            "the hub does not accept the token in HF_TOKEN",
        ),
        (uncached(answer(503)), "it is not whole in the local cache, and the hub answered 503"),
        (uncached(OfflineModeIsEnabled("offline")), "it is not whole in the local cache, and HF_HUB_OFFLINE"),
        (uncached(httpx.ConnectError("no route")), "it is not whole in the local cache, and https://"),
        (httpx.ProxyError("no proxy"), "it is not whole in the local cache, and https://"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be downloaded: No space left on device"),
    ],
)
def test_a_model_that_the_hub_does_not_give_says_why(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(name: str, *, revision: str | None, allow_patterns: str | list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(CheckpointError) as refused:
        find_model("hf://tiny/absent")
    assert refused.value.message.startswith(f"model: {says}")


@pytest.mark.parametrize(
    ("source", "name"), [("hf://tiny/mixtral", "tiny/mixtral"), ("/models/tiny/", "tiny"), ("models/a", "a")]
)
def test_a_model_is_called_by_its_hub_name_or_its_folder(source: str, name: str) -> None:
    assert name_model(source) == name
