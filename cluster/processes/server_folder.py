"""The folder of a local server: private, and short enough for the unix sockets that Ray puts into it.

Its owner holds a lock on a file in it for as long as it lives, so that the next server can tell the folder of a
killed one and remove it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from moesaic.errors import Unavailable

log = logging.getLogger(__name__)

PREFIX = "moesaic-"
LOCK = "owner.lock"
# What the kernel allows for the path of a unix socket.
MAX_SOCKET_PATH = 107
# The longest path that Ray makes below the place of the folder.
_LONGEST = f"/{PREFIX}12345678/ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
MAX_PLACE = MAX_SOCKET_PATH - len(_LONGEST)
_USUAL_PLACES = (Path("/tmp"), Path("/var/tmp"))
# How often a new folder may be taken for a dead one, by a server that starts at the same moment.
_TRIES = 8


class ServerFolder:
    """`path` belongs to this user alone. Ray opens the folder that it is given to everybody, hence `ray` inside."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, places: Iterable[Path]) -> Self:
        """A new folder in the first place that will do, after those of dead servers were removed.

        Raises Unavailable where none will do.
        """
        tried: list[str] = []
        for place in places:
            problem = _problem(place)
            if problem is None:
                remove_dead(place)
                return cls._create(place)
            tried.append(f"{place} {problem}")
            log.debug("%s", tried[-1])
        raise Unavailable(
            f"TMPDIR: {'; '.join(tried)}: let it name a writable folder whose path has at most {MAX_PLACE} characters",
            field="TMPDIR",
        )

    @classmethod
    def _create(cls, place: Path) -> Self:
        for _ in range(_TRIES):
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))  # accessible to this user only
            try:
                lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileNotFoundError:  # taken for a dead one, and removed
                continue
            if _try_lock(lock):
                (path / "ray").mkdir()
                return cls(path, lock)
            os.close(lock)
        raise Unavailable(f"TMPDIR: no folder can be locked in {place}", field="TMPDIR")

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def places(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where the folder may be: in TMPDIR, else where temporary files usually are."""
    wanted = environment.get("TMPDIR")
    return (*((Path(wanted).absolute(),) if wanted else ()), *_USUAL_PLACES)


def remove_dead(place: Path) -> None:
    """Removes the folders of this user's servers that live no more."""
    for path in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _opened(path / LOCK) as lock:
            if path.lstat().st_uid == os.getuid() == os.fstat(lock).st_uid and _try_lock(lock):
                shutil.rmtree(path, ignore_errors=True)


def _problem(place: Path) -> str | None:
    """Why a place cannot be used; None where it can."""
    if len(os.fsencode(place)) > MAX_PLACE:
        return f"is too long for the paths of sockets (over {MAX_PLACE} characters)"
    try:
        mode = place.stat().st_mode
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if not stat.S_ISDIR(mode) or not os.access(place, os.W_OK | os.X_OK):
        return "is not a writable folder"
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return "lets every user rename the files of others"
    return None


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
