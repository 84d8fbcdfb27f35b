"""Calls at a worker, as they come over each of its three transports.

The batcher is played: it takes no thread, and answers every call that it is offered once a connection has been read.
"""

from __future__ import annotations
