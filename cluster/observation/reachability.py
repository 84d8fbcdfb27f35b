"""A sentence for a person where nothing listens at a router's address."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moesaic.errors import Unavailable


@contextmanager
def explaining_absence(target: str, cannot_connect: Callable[[], bool]) -> Iterator[None]:
    """Turns the error of a `target` that cannot be connected to into one that says what to check."""
    try:
        yield
    except Unavailable as error:
        if not cannot_connect():
            raise
        raise Unavailable(f"no router answers at {target}: is `moesaic serve` running?") from error
