"""Moesaic: a server for mixture-of-experts language models in which every expert is a service.

`import moesaic` is the client library. What the processes of a cluster share (contracts, errors, channels, telemetry)
lies in the modules beside it.
"""

from importlib.metadata import PackageNotFoundError, version

from moesaic import errors
from moesaic.client import Client, SyncClient
from moesaic.completion import Completion, Token

try:
    __version__ = version("moesaic")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["Client", "Completion", "SyncClient", "Token", "__version__", "errors"]
