"""The connection of the client verbs to a router: the client library, and a clear message when none answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moesaic import Client
from moesaic.errors import Unavailable


@asynccontextmanager
async def router_client(target: str) -> AsyncIterator[Client]:
    """A client of the router at HOST:PORT. Raises Unavailable that names the address where none listens."""
    async with Client(target) as client:
        try:
            yield client
        except Unavailable as error:
            if not client.cannot_connect:
                raise
            raise Unavailable(f"no router answers at {target}: is `moesaic serve` running?") from error
