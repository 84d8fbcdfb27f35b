"""What the compute thread waits on: the sources that it reads itself, and a wake-up from other threads."""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import Protocol


class Source(Protocol):
    """A file descriptor that brings calls, or connections, to the compute thread."""

    def fileno(self) -> int: ...

    def read(self) -> None:
        """Takes what is there without waiting.

        Called on the compute thread when there is something to read, or room to write where that is awaited.
        """
        ...

    def close(self) -> None: ...


class Poller:
    """A selector with a wake-up pipe. Belongs to the compute thread, except for `wake` and `add`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)

    def wake(self) -> None:
        """Ends the current `wait`, or the next one. May be called from any thread."""
        # A full pipe wakes already, and nothing waits on a closed one.
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"\0")

    def add(self, source: Source) -> None:
        """May be called from any thread."""
        self._selector.register(source, selectors.EVENT_READ, source)

    def await_room(self, source: Source, awaited: bool) -> None:
        """Sets whether the source is also ready when it can be written to."""
        events = selectors.EVENT_READ | selectors.EVENT_WRITE if awaited else selectors.EVENT_READ
        self._selector.modify(source, events, source)

    def remove(self, source: Source) -> None:
        """Must be called before the source closes."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(source)

    def wait(self, timeout_s: float) -> list[Source]:
        """The sources that are ready, after at most `timeout_s`; a wake-up alone gives none."""
        ready: list[Source] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._drain_wake_ups()
            else:
                ready.append(key.data)
        return ready

    def close(self) -> None:
        """Closes everything, including the sources."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _drain_wake_ups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
