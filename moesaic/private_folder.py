"""A temporary folder of one process and user, which the next such process removes if its owner was killed.

The owner holds a lock on a file in it for as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

PREFIX = "moesaic-"
LOCK = "owner.lock"
# How often a new folder may be taken for a dead one, by a process that starts at the same moment.
_TRIES = 8


class PrivateFolder:
    """`path` can be entered by this user alone."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, place: Path, spare: Callable[[Path], bool] = lambda _: False) -> Self:
        """A new folder in `place`, after those of dead owners were removed, but for those that `spare` picks.
        Raises OSError."""
        remove_dead(place, spare)
        for _ in range(_TRIES):
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))  # accessible to this user only
            try:
                lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileNotFoundError:  # taken for a dead one, and removed
                continue
            if _try_lock(lock):
                return cls(path, lock)
            os.close(lock)
        raise OSError(f"no folder can be locked in {place}")

    def remove(self) -> None:
        """May be called once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Such a folder where temporary files are kept now; it ends with the context. Raises OSError."""
    folder = PrivateFolder.create(Path(os.environ.get("TMPDIR") or tempfile.gettempdir()))
    try:
        yield folder.path
    finally:
        folder.remove()


def remove_dead(place: Path, spare: Callable[[Path], bool] = lambda _: False) -> None:
    """Removes the folders of this user's processes that live no more, but for those that `spare` picks."""
    for path in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _opened(path / LOCK) as lock:
            is_ours = path.lstat().st_uid == os.getuid() == os.fstat(lock).st_uid
            if is_ours and _try_lock(lock) and not spare(path):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
