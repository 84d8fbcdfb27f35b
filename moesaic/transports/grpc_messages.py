"""gRPC messages in a stream of bytes: each follows five bytes with a compression flag and its length."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from moesaic.transports.grpc_headers import INTERNAL, RESOURCE_EXHAUSTED, UNIMPLEMENTED

_PREFIX = struct.Struct(">BL")
PREFIX_BYTES = _PREFIX.size


class BadMessage(Exception):
    """A message that ends its call with an error. `code` is the gRPC status code."""

    def __init__(self, code: int, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


def with_prefix(message: bytes) -> bytes:
    return _PREFIX.pack(0, len(message)) + message


class MessageReader:
    """Assembles the messages of one direction of one call. `compresses` says whether the caller announced a
    compression, which changes the status of a compressed message."""

    __slots__ = ("_compresses", "_max_message_bytes", "_pending")

    def __init__(self, max_message_bytes: int, *, compresses: bool = False) -> None:
        self._max_message_bytes = max_message_bytes
        self._compresses = compresses
        # The beginning of the next message. A list of pieces would cost more, as each may be a single byte.
        self._pending = bytearray()

    @property
    def within_message(self) -> bool:
        return bool(self._pending)

    def read(self, data: bytes) -> list[bytes] | Iterator[bytes]:
        """The messages that `data` completes. Raises BadMessage, possibly while the result is iterated;
        nothing may be read after that."""
        if not self._pending and len(data) >= PREFIX_BYTES:
            compressed, num_bytes = _PREFIX.unpack_from(data)
            # The usual case: one frame holds exactly one message.
            if (
                PREFIX_BYTES + num_bytes == len(data)
                and not compressed
                and num_bytes <= self._max_message_bytes
            ):
                return [data[PREFIX_BYTES:]]
        return self._read_pieces(data)

    def _read_pieces(self, data: bytes) -> Iterator[bytes]:
        pending = self._pending
        pending += data
        start = 0
        while len(pending) - start >= PREFIX_BYTES:
            compressed, num_bytes = _PREFIX.unpack_from(pending, start)
            self._check(compressed, num_bytes)
            begin = start + PREFIX_BYTES
            if begin + num_bytes > len(pending):
                break
            start = begin + num_bytes
            with memoryview(pending) as view:
                message = bytes(view[begin:start])
            yield message
        del pending[:start]

    def _check(self, compressed: int, num_bytes: int) -> None:
        if compressed:
            code = UNIMPLEMENTED if self._compresses else INTERNAL
            raise BadMessage(code, "the message is compressed, which is not supported here")
        if num_bytes > self._max_message_bytes:
            raise BadMessage(
                RESOURCE_EXHAUSTED, f"the message is longer than {self._max_message_bytes} bytes"
            )
