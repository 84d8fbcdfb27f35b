"""The source of a model's folder: a path, or `hf://ORG/NAME` through the Hugging Face cache.

The hub is accessed only with the explicit prefix, so that a mistyped path is an error and not a download.
HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.
"""

from __future__ import annotations

from pathlib import Path

from moesaic.checkpoints.checkpoint import CONFIG_FILE
from moesaic.errors import CheckpointError

# The model that is served by default.
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"

HUB_PREFIX = "hf://"
# The patterns for config, tokenizer and chat template. They match neither code nor pickles.
HUB_DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model*"]
# Some repositories hold the same weights twice: in the form of transformers and in Mistral's.
HUB_WEIGHTS, HUB_MISTRAL_WEIGHTS = "model*.safetensors", "consolidated*.safetensors"


def find_model(source: str) -> Path:
    """The folder of a model, downloaded where necessary. Raises CheckpointError."""
    if not source.startswith(HUB_PREFIX):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        name = source.removeprefix(HUB_PREFIX)
        folder = Path(snapshot_download(name, allow_patterns=HUB_DESCRIPTION))
        weights = HUB_WEIGHTS if (folder / CONFIG_FILE).is_file() else HUB_MISTRAL_WEIGHTS
        return Path(snapshot_download(name, allow_patterns=weights))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model: {source} is neither in the local cache nor to be had from the hub", field="model"
        ) from error


def name_model(source: str) -> str:
    """The default name in the API: ORG/NAME for the hub (its folders are hashes), else the folder's name."""
    if source.startswith(HUB_PREFIX):
        return source.removeprefix(HUB_PREFIX)
    return Path(source).resolve().name
