"""The client verbs' way to a router: the client library, and a plain word when nobody is there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moesaic import Client
from moesaic.errors import Unavailable

# How gRPC begins what it says of an address at which nobody listens, and of a name that nobody has.
_NOBODY = ("failed to connect", "errors resolving", "DNS resolution failed")


@asynccontextmanager
async def router_client(target: str) -> AsyncIterator[Client]:
    """A client of the router at HOST:PORT."""
    try:
        async with Client(target) as client:
            yield client
    except Unavailable as error:
        if not error.message.startswith(_NOBODY):
            raise
        raise Unavailable(f"no router answers at {target}: is `moesaic serve` running?") from error
