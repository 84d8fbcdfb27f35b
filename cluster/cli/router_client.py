"""The client library as the verbs use it, with an error that helps where no router answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.observation.reachability import explaining_absence
from moesaic import Client


@asynccontextmanager
async def router_client(target: str) -> AsyncIterator[Client]:
    """A client of the router at HOST:PORT."""
    with explaining_absence(target):
        async with Client(target) as client:
            yield client
