"""The source of a model's folder: a path, or `hf://ORG/NAME` through the Hugging Face cache.

The hub is accessed only with the explicit prefix, so that a mistyped path is an error and not a download.
HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from moesaic.checkpoints.checkpoint import CONFIG_FILE, GGUF_SUFFIX, NO_GGUF, PICKLE_SUFFIXES
from moesaic.checkpoints.safetensors_file import refuse
from moesaic.errors import CheckpointError

# The model that is served by default.
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"

HUB_PREFIX = "hf://"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
# The patterns for config, tokenizer and chat template. They match neither code nor pickles.
HUB_DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model*"]
# Some repositories hold the same weights twice: in the form of transformers and in Mistral's.
HUB_WEIGHTS, HUB_MISTRAL_WEIGHTS = "model*.safetensors", "consolidated*.safetensors"


def is_of_hub(source: str) -> bool:
    return source.startswith(HUB_PREFIX)


def find_here(folder: Path, source: str | None) -> Path:
    """The folder of a model on this machine, which another one has found at `folder`. From the hub it has the very
    revision that was found there. Raises CheckpointError where the hub does not give it."""
    if source is None or folder.is_dir():
        return folder
    try:
        return find_model(source, revision=folder.name)  # the hub's cache names a snapshot by its commit
    except CheckpointError as error:
        reason = error.message.removeprefix("model: ")
        raise CheckpointError(f"model: {source} is not on this node: {reason}", field="model") from error


def find_model(source: str, *, revision: str | None = None) -> Path:
    """The folder of a model, downloaded where necessary; `revision`: of the hub, by default the newest. Raises
    CheckpointError."""
    if not is_of_hub(source):
        return _check_path(Path(source), source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    from cluster.checkpoints.hub_errors import explain_absence

    name = source.removeprefix(HUB_PREFIX)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_DESCRIPTION))
        weights = HUB_WEIGHTS if (folder / CONFIG_FILE).is_file() else HUB_MISTRAL_WEIGHTS
        return Path(snapshot_download(name, revision=revision, allow_patterns=weights))
    except (HfHubHTTPError, HFValidationError, OSError, HTTPError) as error:
        raise CheckpointError(f"model: {explain_absence(name, error)}", field="model") from error


def name_model(source: str) -> str:
    """The default name in the API: ORG/NAME for the hub (its folders are hashes), else the folder's name."""
    if is_of_hub(source):
        return source.removeprefix(HUB_PREFIX)
    return Path(source).resolve().name


def _check_path(path: Path, source: str) -> Path:
    """The path, if it is a folder."""
    if not path.is_dir():
        refuse("model", _explain_file(path) if path.exists() else _explain_nothing(path, source))
    return path


def _explain_file(path: Path) -> str:
    if path.suffix == GGUF_SUFFIX:
        return NO_GGUF
    if path.suffix in (".safetensors", ".json", *PICKLE_SUFFIXES):
        return f"is a file: name the folder that it is in, {shlex.quote(str(path.parent))}"
    return "is a file: name the folder of a model"


def _explain_nothing(path: Path, source: str) -> str:
    if path.suffix == GGUF_SUFFIX:
        return f"no such file, and {NO_GGUF}"
    if _HUB_NAME.fullmatch(source):
        return f"no such folder here; from the hub: {HUB_PREFIX}{source}"
    if "/" not in source:
        return f"no such folder here; a model of the hub is {HUB_PREFIX}ORG/NAME"
    return "no such folder"
