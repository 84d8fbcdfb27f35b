"""A sentence for a person where gRPC reports that nothing listens at a router's address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moesaic.errors import Unavailable

# How gRPC's messages begin when nothing listens at an address, and when a name has no address.
_UNREACHABLE = ("failed to connect", "errors resolving", "DNS resolution failed")


@contextmanager
def explaining_absence(target: str) -> Iterator[None]:
    """Turns the error of an unreachable `target` into one that says what to check."""
    try:
        yield
    except Unavailable as error:
        if not error.message.startswith(_UNREACHABLE):
            raise
        raise Unavailable(f"no router answers at {target}: is `moesaic serve` running?") from error
