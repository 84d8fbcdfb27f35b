"""The bundles of a cluster: STATE/bundles/DIGEST-HEX/, each complete and verified.

A bundle is written to a folder of its own, forced to the disk, verified, and only then renamed to its digest. Nothing
that a caller sends becomes a path: the three files have fixed names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cluster.control.epoch_store import go_on
from moesaic.bundles import Bundle, Manifest, open_bundle
from moesaic.bundles.bundle import MAX_SIGNATURE_BYTES
from moesaic.bundles.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, SIGNATURE_FILE, WEIGHTS_FILE
from moesaic.epoch import DIGEST_BYTES
from moesaic.errors import FailedPrecondition, InvalidArgument, NotFound, Overloaded

MAX_UPLOADS = 4
PIECE_BYTES = 1 << 20
# The steps of an upload at which tests let it crash.
FAILPOINTS = ("bundle.begun", "bundle.written", "bundle.verified", "bundle.stored")

_INCOMING = "incoming-"
_LEAVING = "leaving-"
# Raises InvalidArgument for a bundle that is not to be had.
Verify = Callable[[Bundle], None]


class BundleStore:
    """The bundles below one folder. Its methods block on the disk."""

    def __init__(
        self,
        folder: Path,
        verify: Verify,
        *,
        max_bytes: int,
        failpoints: Callable[[str], None] = go_on,
    ) -> None:
        """`max_bytes` bounds the weights of one bundle. What unfinished uploads and deletions left behind is deleted."""
        self._folder = folder
        self._verify = verify
        self._max_bytes = max_bytes
        self._failpoints = failpoints
        self._num_uploads = 0
        self._manifests: dict[bytes, Manifest] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for left in (*folder.glob(f"{_INCOMING}*"), *folder.glob(f"{_LEAVING}*")):
            shutil.rmtree(left)

    def upload(self) -> Upload:
        """Begins an upload. Raises Overloaded while there are too many."""
        if self._num_uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} bundles are being uploaded already", retry_after_s=1.0)
        with _disk_errors():
            incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._folder))
        self._num_uploads += 1
        self._failpoints("bundle.begun")
        return Upload(self, incoming)

    def folder(self, digest: bytes) -> Path:
        """Where a bundle is. Raises NotFound with field `bundle`."""
        if not self.has(digest):
            raise NotFound(f"bundle: {digest.hex()[:64]} is not stored", field="bundle")
        return self._folder / digest.hex()

    def has(self, digest: bytes) -> bool:
        return len(digest) == DIGEST_BYTES and (self._folder / digest.hex()).is_dir()

    def open(self, digest: bytes) -> Bundle:
        """Raises NotFound, or InvalidArgument with field `bundle` for one that was damaged since."""
        return open_bundle(self.folder(digest))

    def manifest(self, digest: bytes) -> Manifest:
        """The manifest of a stored bundle, which never changes. Raises NotFound, InvalidArgument."""
        if digest not in self._manifests:
            self._manifests[digest] = self.open(digest).manifest
        return self._manifests[digest]

    def digests(self) -> list[bytes]:
        return sorted(
            bytes.fromhex(folder.name)
            for folder in self._folder.iterdir()
            if not folder.name.startswith((_INCOMING, _LEAVING))
        )

    def pieces(self, digest: bytes, offset: int) -> Iterator[bytes]:
        """The bytes of the weights' file from an offset on. Raises NotFound, InvalidArgument."""
        file = self.folder(digest) / WEIGHTS_FILE
        if offset > file.stat().st_size:
            raise InvalidArgument("offset: is beyond the end of the weights", field="offset")
        with file.open("rb") as opened:
            opened.seek(offset)
            while piece := opened.read(PIECE_BYTES):
                yield piece

    def keep(self, incoming: Path) -> tuple[Bundle, bool]:
        """Verifies a complete upload and gives it its name. Returns the bundle, and whether it was there already."""
        bundle = open_bundle(incoming)
        self._verify(bundle)
        self._failpoints("bundle.verified")
        target = self._folder / bundle.digest.hex()
        known = target.is_dir()
        if not known:
            incoming.rename(target)
            _force(self._folder)
        self._failpoints("bundle.stored")
        return open_bundle(target), known

    def withdraw(self, digest: bytes) -> Path:
        """A bundle is not stored any more; `delete` gives back the space of what is returned. Raises NotFound."""
        folder, leaving = self.folder(digest), self._folder / f"{_LEAVING}{uuid.uuid4().hex}"
        self._manifests.pop(digest, None)
        folder.rename(leaving)
        _force(self._folder)
        return leaving

    def delete(self, leaving: Path) -> None:
        shutil.rmtree(leaving)

    def end(self, incoming: Path) -> None:
        """Deletes what is left of an upload."""
        self._num_uploads -= 1
        shutil.rmtree(incoming, ignore_errors=True)

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def passed(self, step: str) -> None:
        self._failpoints(step)


class Upload:
    """One upload: `write` its parts in order, then `finish`; `close` in any case."""

    def __init__(self, store: BundleStore, incoming: Path) -> None:
        self._store = store
        self._incoming = incoming
        self._files: dict[str, BinaryIO] = {}
        self._limits = {
            MANIFEST_FILE: MAX_MANIFEST_BYTES,
            SIGNATURE_FILE: MAX_SIGNATURE_BYTES,
            WEIGHTS_FILE: store.max_bytes,
        }

    def write_manifest(self, data: bytes) -> None:
        self._write_whole(MANIFEST_FILE, data)

    def write_signature(self, data: bytes) -> None:
        self._write_whole(SIGNATURE_FILE, data)

    def write_weights(self, data: bytes) -> None:
        """The next bytes. Raises InvalidArgument beyond the limit, FailedPrecondition where the disk is full."""
        if MANIFEST_FILE not in self._files:
            raise _refused("the manifest must come first")
        self._write(WEIGHTS_FILE, data)

    def finish(self) -> tuple[Bundle, bool]:
        """The verified bundle, and whether the store had it already. Raises InvalidArgument with field `bundle`."""
        with _disk_errors():
            for file in self._files.values():
                _sync(file)
                file.close()
            _force(self._incoming)
            self._store.passed("bundle.written")
            return self._store.keep(self._incoming)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._store.end(self._incoming)

    def _write_whole(self, name: str, data: bytes) -> None:
        if name in self._files or WEIGHTS_FILE in self._files:
            raise _refused(f"{name} comes once, before the weights")
        self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        with _disk_errors():
            file = self._files.get(name) or self._files.setdefault(name, (self._incoming / name).open("wb"))
            if file.tell() + len(data) > self._limits[name]:
                raise _refused(
                    f"{name} is too large: the limit is {self._limits[name] >> 20} MiB", "TOO_LARGE"
                )
            file.write(data)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns a full disk into a refusal that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FailedPrecondition(
            "bundle: the disk of the controller's state folder is full", field="bundle", reason="DISK_FULL"
        ) from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _force(folder: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(problem: str, reason: str = "BUNDLE_FILES") -> InvalidArgument:
    return InvalidArgument(f"bundle: {problem}", field="bundle", reason=reason)
