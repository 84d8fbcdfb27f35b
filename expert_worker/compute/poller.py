"""What the compute thread waits on: the callers that it reads itself, and a bell for whoever brings calls in another way."""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import Protocol


class Source(Protocol):
    """Something that brings calls by itself: a lane, a direct connection, or the door through which they come."""

    def fileno(self) -> int: ...

    def read(self) -> None:
        """Takes what is there without waiting; comes on the compute thread, when there is something, or room to write
        where that is awaited."""
        ...

    def close(self) -> None: ...


class Inbox:
    """Belongs to the compute thread, but for `ring` and `add`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)

    def ring(self) -> None:
        """Ends a `wait`, this one or the next."""
        # Full: it rings already. Closed: nobody waits.
        with contextlib.suppress(OSError):
            self._ringer.send(b"\0")

    def add(self, source: Source) -> None:
        self._selector.register(source, selectors.EVENT_READ, source)

    def await_room(self, source: Source, awaited: bool) -> None:
        """From now on the source is also ready when it can be written to, or no longer."""
        events = selectors.EVENT_READ | selectors.EVENT_WRITE if awaited else selectors.EVENT_READ
        self._selector.modify(source, events, source)

    def remove(self, source: Source) -> None:
        """Call it before the source closes."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(source)

    def wait(self, timeout_s: float) -> list[Source]:
        """The sources that are ready, after at most `timeout_s`; none of them when the bell rings."""
        ready: list[Source] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._silence()
            else:
                ready.append(key.data)
        return ready

    def close(self) -> None:
        """Closes everything, the sources as well."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data.close()
        self._selector.close()
        self._bell.close()
        self._ringer.close()

    def _silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)
