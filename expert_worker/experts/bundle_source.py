"""Where a bundle is found: in its folder if that lies on this host, else fetched from the controller."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import grpc

from moesaic import rpc
from moesaic.bundles import Bundle, Manifest, open_bundle
from moesaic.bundles.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, WEIGHTS_FILE
from moesaic.checkpoints.safetensors_file import DTYPE_BYTES, MAX_HEADER_BYTES
from moesaic.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MoesaicError,
    Unavailable,
    from_rpc_error,
)
from moesaic.v1 import control_pb2, control_pb2_grpc

# The longest that the next bytes of a bundle may take to come.
MESSAGE_TIMEOUT_S = 30.0
# How often a broken transfer goes on where it ended before it counts as failed, without a byte in between.
MAX_ATTEMPTS = 3
RETRY_PERIOD_S = 0.5
# How long a fetched bundle stays, so that the request to probe that follows the one to load need not fetch it again.
KEEP_S = 30.0
TEMPORARY_PREFIX = "moesaic-"

FreeDisk = Callable[[Path], int]


def free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class BundleSource:
    """Opens bundles by their digest. All methods are called on one event loop."""

    def __init__(
        self,
        *,
        message_timeout_s: float = MESSAGE_TIMEOUT_S,
        retry_period_s: float = RETRY_PERIOD_S,
        keep_s: float = KEEP_S,
        free_disk: FreeDisk = free_disk,
    ) -> None:
        self._message_timeout_s = message_timeout_s
        self._retry_period_s = retry_period_s
        self._keep_s = keep_s
        self._free_disk = free_disk
        self._fetching = asyncio.Lock()
        self._fetched: dict[bytes, _Fetched] = {}

    @asynccontextmanager
    async def open(self, digest: bytes, folder: str, control_address: str) -> AsyncIterator[Bundle]:
        """The bundle with this digest, for as long as the context is open. What was fetched is removed a moment after.

        Raises FailedPrecondition, field `bundle`, reason BUNDLE_NOT_FOUND or DISK_FULL; DataLoss when something else
        was sent; DeadlineExceeded or Unavailable for a controller that does not answer.
        """
        if (found := await asyncio.to_thread(_find, folder, digest)) is not None:
            yield found
            return
        async with self._fetching:
            fetched = self._fetched.get(digest) or await self._fetch_new(digest, control_address)
            fetched.num_users += 1
        try:
            yield fetched.bundle
        finally:
            fetched.num_users -= 1
            asyncio.get_running_loop().call_later(self._keep_s, self._remove_unused, digest)

    def close(self) -> None:
        """Removes what is kept for a request that may follow."""
        self._keep_s = 0
        for digest in list(self._fetched):
            self._remove_unused(digest)

    def _remove_unused(self, digest: bytes) -> None:
        fetched = self._fetched.get(digest)
        if fetched is not None and not fetched.num_users:
            del self._fetched[digest]
            fetched.folder.cleanup()

    async def _fetch_new(self, digest: bytes, address: str) -> _Fetched:
        if not address:
            raise FailedPrecondition(
                "bundle: is not on this worker's host, and the request names no controller to fetch it from",
                field="bundle",
                reason="BUNDLE_NOT_FOUND",
            )
        folder = tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, ignore_cleanup_errors=True)
        try:
            await self._fetch(digest, address, Path(folder.name))
            bundle = await asyncio.to_thread(open_bundle, folder.name)
        except OSError as error:
            folder.cleanup()
            raise _disk_error(error) from error
        except BaseException:
            folder.cleanup()
            raise
        self._fetched[digest] = fetched = _Fetched(bundle, folder)
        return fetched

    async def _fetch(self, digest: bytes, address: str, folder: Path) -> None:
        async with rpc.aio_channel(address, max_message_bytes=rpc.DATA_MESSAGE_BYTES) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            with (folder / WEIGHTS_FILE).open("wb") as file:
                transfer = _Transfer(digest, folder, file, self._free_disk)
                attempts = 0
                while not transfer.complete:
                    before = transfer.num_bytes
                    try:
                        await self._receive(stub, transfer)
                    except (Unavailable, DeadlineExceeded):
                        attempts = 1 if transfer.num_bytes > before else attempts + 1
                        if attempts >= MAX_ATTEMPTS:
                            raise
                        await asyncio.sleep(self._retry_period_s)

    async def _receive(self, stub: control_pb2_grpc.ControlServiceStub, transfer: _Transfer) -> None:
        """Receives from where the transfer has come to until the stream ends."""
        request = control_pb2.FetchBundleRequest(digest=transfer.digest, offset=transfer.num_bytes)
        stream = stub.FetchBundle(request)
        try:
            while True:
                async with asyncio.timeout(self._message_timeout_s):
                    message = await stream.read()
                if message is grpc.aio.EOF:
                    break
                await asyncio.to_thread(transfer.take, rpc.received(message))
        except TimeoutError:
            raise DeadlineExceeded("bundle: the controller sends nothing any more", field="bundle") from None
        except grpc.aio.AioRpcError as error:
            raise _with_field(from_rpc_error(error)) from error
        finally:
            stream.cancel()
        transfer.end()


@dataclass(slots=True)
class _Fetched:
    """A bundle in a temporary folder."""

    bundle: Bundle
    folder: tempfile.TemporaryDirectory[str]
    num_users: int = 0


class _Transfer:
    """What has come of a bundle so far."""

    def __init__(self, digest: bytes, folder: Path, file: BinaryIO, free_disk: FreeDisk) -> None:
        self.digest = digest
        self.num_bytes = 0
        self.complete = False
        self._folder = folder
        self._file = file
        self._free_disk = free_disk
        self._most_bytes: int | None = None

    def take(self, message: control_pb2.FetchBundleResponse) -> None:
        """Writes what a message holds. Raises DataLoss for a manifest that is not the one that was asked for, or for
        more bytes than it promises."""
        if self._most_bytes is None:
            self._begin(message.manifest)
        assert self._most_bytes is not None
        if self.num_bytes + len(message.weights) > self._most_bytes:
            raise DataLoss("bundle: more weights came than the manifest promises", field="bundle")
        self.num_bytes += self._file.write(message.weights)

    def end(self) -> None:
        """To be called when the stream has ended well."""
        if self._most_bytes is None:
            raise DataLoss("bundle: the controller sent no manifest", field="bundle")
        self._file.flush()
        self.complete = True

    def _begin(self, content: bytes) -> None:
        if len(content) > MAX_MANIFEST_BYTES or hashlib.sha256(content).digest() != self.digest:
            raise DataLoss(
                "bundle: the controller sent another manifest than the one with this digest",
                field="bundle",
                reason="BUNDLE_DIGEST",
            )
        promised = sum(
            _num_bytes(facts.dtype, facts.shape) for facts in Manifest.from_json(content).tensors.values()
        )
        if (missing := promised - self._free_disk(self._folder)) > 0:
            raise _disk_full(missing)
        (self._folder / MANIFEST_FILE).write_bytes(content)
        self._most_bytes = promised + MAX_HEADER_BYTES


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = DTYPE_BYTES.get(dtype, 0)
    for extent in shape:
        count *= extent
    return count


def _find(folder: str, digest: bytes) -> Bundle | None:
    """The bundle in a folder, if it is there with this digest."""
    if not folder:
        return None
    try:
        bundle = open_bundle(folder)
    except InvalidArgument:
        return None
    return bundle if bundle.digest == digest else None


def _with_field(error: MoesaicError) -> MoesaicError:
    error.field = error.field or "bundle"
    return error


def _disk_error(error: OSError) -> FailedPrecondition:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(None)
    return FailedPrecondition(f"bundle: cannot be written on this worker: {error.strerror}", field="bundle")


def _disk_full(missing: int | None) -> FailedPrecondition:
    what = (
        "the disk for temporary files is full" if missing is None else f"{missing} bytes of disk are missing"
    )
    return FailedPrecondition(f"bundle: {what} on this worker", field="bundle", reason="DISK_FULL")
