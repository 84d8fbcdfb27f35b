"""A listening socket whose callers are let in one by one, or turned away: nobody is left standing before it.

Where the process has no file descriptor left, a caller cannot even be refused, and the socket would stay ready for ever:
the thread that waits on it would run in circles. So one descriptor is kept for that case.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress

log = logging.getLogger(__name__)

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class Entrance:
    """Takes over a socket that listens."""

    def __init__(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._spare = _open_spare()

    def fileno(self) -> int:
        return self._listening.fileno()

    def accept(self) -> socket.socket | None:
        """The next caller; None when it did not wait or could not be let in."""
        if self._spare is None:
            self._spare = _open_spare()
        try:
            return self._listening.accept()[0]
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._turn_away()
            return None

    def close(self) -> None:
        self._listening.close()
        self._close_spare()

    def _turn_away(self) -> None:
        log.warning("a caller was turned away: no file descriptor is left")
        self._close_spare()
        with suppress(OSError):
            self._listening.accept()[0].close()
        self._spare = _open_spare()

    def _close_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None


def _open_spare() -> int | None:
    """None where another thread was faster."""
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None
