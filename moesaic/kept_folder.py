"""Files in shared memory that outlive the process that wrote them, so that its successor need not make them again.

    PLACE/moesaic-kept-UID/           of one user, who alone can enter it
        pool/NAME                     every file once, however many processes use it
        users/moesaic-XXXXXXXX/       of one process, which holds a lock on a file in it for as long as it lives
            owner.lock
            NAME                      another name of the same file

The system counts the names and the mappings of a file: its memory returns with the last of them. A file is complete
before it gets its name and never changes nor shrinks again, so who maps one can rely on it.

What a killed process leaves stays until a successor uses all of it as well, or for `KEEP_S`. It is removed by the
processes that live: at their start, from time to time, and at their end.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from moesaic.private_folder import LOCK, PrivateFolder, remove_dead

PREFIX = "moesaic-kept-"
KEEP_S = 600.0
_FOLDER_MODE, _FILE_MODE = 0o700, 0o400
_UNFINISHED = ".unfinished"


class NoRoom(Exception):
    """The place is full, or what may be used of it."""


class KeptFolder:
    """The files that this process uses. All methods may be called from any thread."""

    def __init__(self, root: Path, own: PrivateFolder, max_bytes: int, clock: Callable[[], float]) -> None:
        self._root = root
        self._pool = root / "pool"
        self._own = own
        self._max_bytes = max_bytes
        self._clock = clock
        # Guards the sum, which counts every file of the pool once.
        self._guard = threading.Lock()
        self._used_bytes = 0
        self._count()

    @classmethod
    def open(
        cls, place: Path, max_bytes: int | None = None, *, clock: Callable[[], float] = time.time
    ) -> Self:
        """Files in `place` with at most `max_bytes` in all, by default half of the place.

        Raises OSError where the place cannot be used, or the folder in it is open to others.
        """
        root = _root(place)
        for folder in (root, root / "pool", root / "users"):
            _make_private(folder)
        own = PrivateFolder.create(root / "users", lambda dead: _is_fresh(dead, clock()))
        _drop_unused(root / "pool")
        size = os.statvfs(place)
        half = size.f_blocks * size.f_frsize // 2
        return cls(root, own, half if max_bytes is None else max_bytes, clock)

    def find(self, name: str) -> Path | None:
        """A file of the pool, which this process uses from now on; None if there is none."""
        path = self._own.path / name
        try:
            os.link(self._pool / name, path)
        except FileExistsError:
            return path
        except FileNotFoundError:
            return None
        return path

    def write(self, name: str, parts: Iterable[bytes | memoryview], num_bytes: int) -> Path:
        """Writes a file, unless there is one of this name; returns where it lies. This process uses it from now on.

        Raises NoRoom, or OSError where the place cannot be written to.
        """
        if (found := self.find(name)) is not None:
            return found
        unfinished = self._own.path / f"{name}{_UNFINISHED}"
        self._take(num_bytes)
        try:
            _write(unfinished, parts, num_bytes)
            path = unfinished.rename(self._own.path / name)
        except BaseException as error:
            self._take(-num_bytes)
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise NoRoom(f"{self._root.parent}: {error.strerror}") from error
            raise
        return self._publish(name, path, num_bytes)

    def drop(self, name: str) -> None:
        """Gives a file up. Its memory returns when no other process uses it either."""
        path = self._own.path / name
        with contextlib.suppress(FileNotFoundError):
            num_bytes = _size(path)
            path.unlink()
            if _drop_if_unused(self._pool / name):
                self._take(-num_bytes)

    def discard(self, name: str) -> None:
        """Removes a file that is damaged, so that nobody finds it any more."""
        for folder in (self._pool, self._own.path):
            (folder / name).unlink(missing_ok=True)

    def tend(self) -> None:
        """Shows that this process lives, and removes what dead ones have left for too long, or wholly to this one."""
        now = self._clock()
        os.utime(self._own.path / LOCK, (now, now))
        own = _names(self._own.path)
        remove_dead(self._root / "users", lambda dead: _is_fresh(dead, now) and not _names(dead) <= own)
        _drop_unused(self._pool)
        self._count()

    def close(self) -> None:
        """Gives all files up. May be called once."""
        self.tend()
        self._own.remove()
        _drop_unused(self._pool)

    def _publish(self, name: str, path: Path, num_bytes: int) -> Path:
        """Gives a file of this process its name in the pool, unless another process was faster."""
        try:
            os.link(path, self._pool / name)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # the other one has dropped it again
                os.link(self._pool / name, other := path.with_name(f"{name}{_UNFINISHED}"))
                self._take(-num_bytes)
                other.replace(path)
        return path

    def _count(self) -> None:
        used = sum(_size(path) for path in self._pool.iterdir())
        with self._guard:
            self._used_bytes = used

    def _take(self, num_bytes: int) -> None:
        with self._guard:
            if num_bytes > 0 and self._used_bytes + num_bytes > self._max_bytes:
                raise NoRoom(f"{self._used_bytes} of at most {self._max_bytes} bytes are taken")
            self._used_bytes += num_bytes


def sweep(place: Path) -> None:
    """Removes all that this user's dead processes have left, for when nobody is to succeed them."""
    root = _root(place)
    if (root / "pool").is_dir():
        remove_dead(root / "users")
        _drop_unused(root / "pool")


def _root(place: Path) -> Path:
    return place / f"{PREFIX}{os.getuid()}"


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode) or stat.S_IMODE(facts.st_mode) & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")


def _write(path: Path, parts: Iterable[bytes | memoryview], num_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _FILE_MODE)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        # The memory is taken at once: a full place is known before anything is copied.
        os.posix_fallocate(descriptor, 0, num_bytes)
        for part in parts:
            rest = memoryview(part).cast("B")
            while rest:
                rest = rest[file.write(rest) :]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(_UNFINISHED)}


def _is_fresh(dead: Path, now_s: float) -> bool:
    """Whether the owner of a folder has shown itself not long ago."""
    return now_s - (dead / LOCK).stat().st_mtime < KEEP_S


def _drop_unused(pool: Path) -> None:
    for path in list(pool.iterdir()):
        _drop_if_unused(path)


def _drop_if_unused(pooled: Path) -> bool:
    """Removes a file of the pool that has no other name. Whoever takes it at this moment keeps it without the pool."""
    with contextlib.suppress(FileNotFoundError):
        if pooled.stat().st_nlink == 1:
            pooled.unlink()
            return True
    return False
