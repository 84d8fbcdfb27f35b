"""Moesaic: a server for mixture-of-experts language models in which every expert is a service.

`import moesaic` is the client library. The other modules of the package hold what the processes of a cluster
share: contracts, errors, channels, telemetry.
"""

from importlib.metadata import PackageNotFoundError, version

from moesaic import errors
from moesaic.client import Client, SyncClient
from moesaic.completion import Completion, Token

try:
    __version__ = version("moesaic")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["Client", "Completion", "SyncClient", "Token", "__version__", "errors"]
