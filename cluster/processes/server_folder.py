"""The folder of a local server: private, and short enough for the unix sockets that Ray puts into it."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from moesaic.errors import Unavailable
from moesaic.private_folder import PREFIX, PrivateFolder

log = logging.getLogger(__name__)

# What the kernel allows for the path of a unix socket.
MAX_SOCKET_PATH = 107
# The longest path that Ray makes below the place of the folder.
_LONGEST = f"/{PREFIX}12345678/ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
MAX_PLACE = MAX_SOCKET_PATH - len(_LONGEST)
_USUAL_PLACES = (Path("/tmp"), Path("/var/tmp"))


class ServerFolder:
    """`path` belongs to this user alone. Ray opens the folder that it is given to everybody, hence `ray` inside."""

    def __init__(self, folder: PrivateFolder) -> None:
        self._folder = folder
        self.ray.mkdir()

    @classmethod
    def create(cls, places: Iterable[Path]) -> Self:
        """A new folder in the first place that will do.

        Raises Unavailable where none will do.
        """
        tried: list[str] = []
        for place in places:
            problem = _problem(place)
            if problem is None:
                return cls(_folder_in(place))
            tried.append(f"{place} {problem}")
            log.debug("%s", tried[-1])
        raise Unavailable(
            f"TMPDIR: {'; '.join(tried)}: let it name a writable folder whose path has at most {MAX_PLACE} characters",
            field="TMPDIR",
        )

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    @property
    def head(self) -> Path:
        """Where Ray's head keeps its state. Ray makes the folder."""
        return self.path / "head"

    def remove(self) -> None:
        self._folder.remove()


def places(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where the folder may be: in TMPDIR, else where temporary files usually are."""
    wanted = environment.get("TMPDIR")
    return (*((Path(wanted).absolute(),) if wanted else ()), *_USUAL_PLACES)


def _folder_in(place: Path) -> PrivateFolder:
    try:
        return PrivateFolder.create(place)
    except OSError as error:
        raise Unavailable(f"TMPDIR: {error}", field="TMPDIR") from error


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
