"""A sentence for a person where nothing listens at a router's address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moesaic.client.attempts import NO_ROUTER
from moesaic.errors import Unavailable


@contextmanager
def hinting_at_serve() -> Iterator[None]:
    """Adds to the error of an address at which no router answers what to check."""
    try:
        yield
    except Unavailable as error:
        if error.reason != NO_ROUTER:
            raise
        raise Unavailable(f"{error.message}: is `moesaic serve` running?", reason=NO_ROUTER) from error
