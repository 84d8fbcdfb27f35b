"""A listening socket that accepts or refuses every connection, even without a free file descriptor.

Without a descriptor a connection cannot even be refused: the socket would stay readable and the thread that
polls it would spin. So one spare descriptor is kept, which is given up to accept and close the connection.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress

log = logging.getLogger(__name__)

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class Listener:
    """Takes over a socket that listens."""

    def __init__(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._spare = _open_spare()

    def fileno(self) -> int:
        return self._listening.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection; None when it is gone already or had to be refused."""
        if self._spare is None:
            self._spare = _open_spare()
        try:
            return self._listening.accept()[0]
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._refuse()
            return None

    def close(self) -> None:
        self._listening.close()
        self._close_spare()

    def _refuse(self) -> None:
        log.warning("a connection was refused: no file descriptor is left")
        self._close_spare()
        with suppress(OSError):
            self._listening.accept()[0].close()
        self._spare = _open_spare()

    def _close_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None


def _open_spare() -> int | None:
    """None if another thread took the last descriptor first."""
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None
