"""Where a model's folder comes from: a path as it is, `hf://ORG/NAME` by way of the Hugging Face cache.

Only the explicit prefix ever reaches for the hub, so that a mistyped path is an error and not a download. HF_HOME,
HF_TOKEN and HF_HUB_OFFLINE mean what they mean everywhere.
"""

from __future__ import annotations

from pathlib import Path

from moesaic.checkpoints.checkpoint import CONFIG_FILE
from moesaic.errors import CheckpointError

# Served where no model is named.
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"

HUB_PREFIX = "hf://"
# Config, tokenizer and chat template; never code, never pickles.
HUB_DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model*"]
# Some repositories hold the same weights twice, in the form of transformers and in Mistral's own.
HUB_WEIGHTS, HUB_NATIVE_WEIGHTS = "model*.safetensors", "consolidated*.safetensors"


def find_model(source: str) -> Path:
    """The folder of a model, downloaded if it has to be. Raises CheckpointError."""
    if not source.startswith(HUB_PREFIX):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        name = source.removeprefix(HUB_PREFIX)
        folder = Path(snapshot_download(name, allow_patterns=HUB_DESCRIPTION))
        weights = HUB_WEIGHTS if (folder / CONFIG_FILE).is_file() else HUB_NATIVE_WEIGHTS
        return Path(snapshot_download(name, allow_patterns=weights))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model: {source} is neither in the local cache nor to be had from the hub", field="model"
        ) from error


def name_model(source: str) -> str:
    """What the API calls a model by default: ORG/NAME of the hub, as snapshots lie under hashes, or the folder's name."""
    if source.startswith(HUB_PREFIX):
        return source.removeprefix(HUB_PREFIX)
    return Path(source).resolve().name
