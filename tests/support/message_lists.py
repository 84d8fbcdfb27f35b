"""Several messages as one input: each behind its length in four bytes, as a stream would carry them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

_LENGTH_BYTES = 4

Kind = TypeVar("Kind", bound=Message)


def join(messages: Iterable[bytes]) -> bytes:
    return b"".join(len(message).to_bytes(_LENGTH_BYTES, "little") + message for message in messages)


def split(raw: bytes) -> list[bytes]:
    """The messages; the last one ends where the input does, whatever its length says."""
    messages = []
    while raw:
        end = _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")
        messages.append(raw[_LENGTH_BYTES:end])
        raw = raw[end:]
    return messages


def parsed(kind: Callable[[], Kind], raw: bytes) -> Kind | None:
    """None for what gRPC refuses by itself."""
    message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        return None
    return message
