"""Moesaic: a server for mixture-of-experts language models in which every expert is a service.

`import moesaic` is the client library. The other modules of the package hold what the processes of a cluster
share: contracts, errors, channels, telemetry.
"""

from importlib.metadata import PackageNotFoundError, version

from moesaic import errors
from moesaic.client.client import Client
from moesaic.client.completion import Completion, Token
from moesaic.client.expert_words import Allow, Deny, Require
from moesaic.client.model_info import ModelInfo
from moesaic.client.router_stats import RouterStats
from moesaic.client.sync_client import SyncClient
from moesaic.client.tokenization import Tokenization
from moesaic.expert_policy import ExpertPolicy

try:
    __version__ = version("moesaic")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Allow",
    "Client",
    "Completion",
    "Deny",
    "ExpertPolicy",
    "ModelInfo",
    "Require",
    "RouterStats",
    "SyncClient",
    "Token",
    "Tokenization",
    "__version__",
    "errors",
]


def __dir__() -> list[str]:
    """Only what is public: the imports above would otherwise be offered for completion too."""
    return __all__
