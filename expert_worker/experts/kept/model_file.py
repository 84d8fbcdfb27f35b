"""What a worker's successor must know of the model before it reads anything: its description, and the versions of the
worker's share. With it, and the experts themselves, a restarted worker needs nothing of the model's folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.epoch import ExpertAddress
from moesaic.kept_folder import KeptFolder, NoRoom

log = logging.getLogger(__name__)

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeptModel:
    """A model's folder as it was when the share was read from it."""

    checkpoint: Checkpoint
    versions: Mapping[ExpertAddress, bytes]


@dataclass(frozen=True, slots=True)
class _Stored:
    checkpoint: Checkpoint
    versions: tuple[tuple[int, int, bytes], ...]

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


_STORED = TypeAdapter(_Stored)


def write_model(folder: KeptFolder, fingerprint: bytes, model: KeptModel) -> None:
    """Keeps what is known of a model with this fingerprint, where there is room."""
    versions = tuple((*address, version) for address, version in sorted(model.versions.items()))
    raw = _STORED.dump_json(_Stored(model.checkpoint, versions))
    parts = (hashlib.sha256(raw).digest(), raw)
    try:
        folder.write(_name(fingerprint, model.versions), parts, sum(map(len, parts)))
    except NoRoom as error:
        log.debug("no room for the description of the model", extra={"fields": {"why": str(error)}})


def read_model(
    folder: KeptFolder, fingerprint: bytes, addresses: Collection[ExpertAddress]
) -> KeptModel | None:
    """What an earlier worker with this share has left; None without one, or where it is damaged."""
    name = _name(fingerprint, addresses)
    path = folder.find(name)
    if path is None:
        return None
    try:
        content = path.read_bytes()
        digest, raw = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(raw).digest() != digest:
            raise ValueError("its digest is another one")
        stored = _STORED.validate_json(raw)
    except (OSError, ValueError, ValidationError) as error:
        log.warning("a kept description is of no use", extra={"fields": {"why": str(error)[:200]}})
        folder.discard(name)
        return None
    return KeptModel(
        stored.checkpoint, {ExpertAddress(layer, slot): version for layer, slot, version in stored.versions}
    )


def _name(fingerprint: bytes, addresses: Collection[ExpertAddress]) -> str:
    share = hashlib.sha256(repr(sorted(map(tuple, addresses))).encode()).hexdigest()
    return f"{fingerprint.hex()[:32]}.{share[:16]}.model"
