"""The client library as the verbs use it, with an error that helps where no router answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.observation.reachability import hinting_at_serve
from moesaic import Client


@asynccontextmanager
async def router_client(target: str) -> AsyncIterator[Client]:
    """A client of the router at HOST:PORT. Raises Unavailable that names the address where none listens."""
    with hinting_at_serve():
        async with Client(target) as client:
            yield client
