"""Why a model of the Hugging Face hub cannot be had, in one sentence that says what to do."""

from __future__ import annotations

from http import HTTPStatus

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

NOT_CACHED = "it is not whole in the local cache"


def explain_absence(name: str, error: Exception) -> str:
    """What is wrong when `error` ended the search for `name`, which is ORG/NAME as it was written."""
    match error:
        case HFValidationError():
            return "is no name of a model on the hub: hf://ORG/NAME"
        case GatedRepoError():
            return (
                f"the model is gated: accept its terms at {constants.ENDPOINT}/{name} "
                "and set HF_TOKEN to a token of that account"
            )
        case RepositoryNotFoundError():
            return "the hub has no such model, or it is private: check the spelling, and HF_TOKEN for a private one"
        case HfHubHTTPError() if error.response.status_code == HTTPStatus.UNAUTHORIZED:
            return "the hub does not accept the token in HF_TOKEN or of `hf auth login`"
        case HfHubHTTPError():
            return f"{NOT_CACHED}, and the hub answered {error.response.status_code}: try again later"
        case LocalEntryNotFoundError():
            return _explain_uncached(name, error.__cause__)
        case OSError() if error.strerror:
            return f"cannot be downloaded: {error.strerror}"
        case _:
            return f"{NOT_CACHED}, and {_unreachable()}"


def _explain_uncached(name: str, cause: BaseException | None) -> str:
    if isinstance(cause, HfHubHTTPError):
        return explain_absence(name, cause)
    if cause is None or isinstance(cause, OfflineModeIsEnabled):
        return f"{NOT_CACHED}, and HF_HUB_OFFLINE forbids to ask the hub"
    return f"{NOT_CACHED}, and {_unreachable()}"


def _unreachable() -> str:
    return f"{constants.ENDPOINT} cannot be reached: is this machine offline, or behind a proxy?"
