"""One controller at a time uses a state folder."""

from __future__ import annotations

import fcntl
from pathlib import Path

from moesaic.errors import FailedPrecondition

LOCK_FILE = "lock"


class StateLock:
    """Held until it is closed, or until the process ends, however it does."""

    def __init__(self, folder: Path) -> None:
        """Raises FailedPrecondition with field `state` if the folder is in use or cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / LOCK_FILE).open("w")
        except OSError as error:
            raise FailedPrecondition(f"state: cannot be used: {error.strerror}", field="state") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise FailedPrecondition(
                "state: another controller uses this folder", field="state", reason="STATE_IN_USE"
            ) from error

    def close(self) -> None:
        self._file.close()
