"""What the model is: expert versions and the epoch.

An expert version is named by the sha256 of its kind, dtype and weights, so the same weights have the same name in any
checkpoint layout. An epoch names the version in every (layer, slot) and is itself named by the hash of that table: two
processes that agree on the epoch's id agree on the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moesaic.errors import FailedPrecondition
from moesaic.v1 import common_pb2, control_pb2

DIGEST_BYTES = 32


class ExpertAddress(NamedTuple):
    """One expert of a model."""

    layer: int
    slot: int


class VersionHasher:
    """Builds the digest of an expert version from its weights, fed part by part in the kind's own order."""

    def __init__(self, kind: str, dtype: str) -> None:
        self._hash = hashlib.sha256(f"moesaic expert version 1\0{kind}\0{dtype}\0".encode())

    def update(self, name: str, shape: tuple[int, ...], data: memoryview | bytes) -> None:
        """Adds one weight: its name within the kind, its shape, and its little-endian bytes."""
        self._hash.update(f"{name}\0{'x'.join(map(str, shape))}\0".encode())
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


@dataclass(frozen=True, slots=True)
class Epoch:
    """The immutable answer to "what is the model"."""

    id: str
    model: str
    versions: Mapping[ExpertAddress, bytes]

    @classmethod
    def of(cls, model: str, versions: Mapping[ExpertAddress, bytes]) -> Epoch:
        """Names the table by its content."""
        ordered = dict(sorted(versions.items()))
        content = hashlib.sha256(f"moesaic epoch 1\0{model}\0".encode())
        for address, digest in ordered.items():
            content.update(f"{address.layer}.{address.slot}=".encode() + digest)
        return cls(content.hexdigest()[:16], model, ordered)

    def to_proto(self) -> control_pb2.Epoch:
        return control_pb2.Epoch(id=self.id, model=self.model, experts=versions_to_proto(self.versions))

    @classmethod
    def from_proto(cls, message: control_pb2.Epoch) -> Epoch:
        epoch = cls.of(message.model, versions_from_proto(message.experts))
        if epoch.id != message.id:
            raise FailedPrecondition("the epoch's id is not the hash of its content", field="epoch.id")
        return epoch


def merge_versions(
    held: Iterable[Mapping[ExpertAddress, bytes]], wanted: Collection[ExpertAddress]
) -> dict[ExpertAddress, bytes]:
    """One version for each of the model's experts, which are `wanted`, out of what the workers hold.

    Raises FailedPrecondition where replicas disagree or a slot is held by nobody.
    """
    versions: dict[ExpertAddress, bytes] = {}
    for worker in held:
        for address, digest in worker.items():
            if versions.setdefault(address, digest) != digest:
                raise FailedPrecondition(
                    f"workers hold different versions of layer {address.layer} slot {address.slot}",
                    reason="VERSIONS_DISAGREE",
                )
    if missing := sorted(set(wanted) - versions.keys()):
        first = missing[0]
        raise FailedPrecondition(
            f"{len(missing)} experts are held by no worker, first: layer {first.layer} slot {first.slot}",
            reason="EXPERTS_MISSING",
        )
    if extra := sorted(versions.keys() - set(wanted)):
        first = extra[0]
        raise FailedPrecondition(
            f"workers hold experts that the model does not have, first: layer {first.layer} slot {first.slot}",
            reason="EXPERTS_UNKNOWN",
        )
    return versions


def versions_to_proto(versions: Mapping[ExpertAddress, bytes]) -> list[common_pb2.ExpertVersion]:
    return [
        common_pb2.ExpertVersion(
            address=common_pb2.ExpertAddress(layer=address.layer, slot=address.slot), digest=digest
        )
        for address, digest in sorted(versions.items())
    ]


def versions_from_proto(messages: Iterable[common_pb2.ExpertVersion]) -> dict[ExpertAddress, bytes]:
    versions = {
        ExpertAddress(message.address.layer, message.address.slot): message.digest for message in messages
    }
    if any(len(digest) != DIGEST_BYTES for digest in versions.values()):
        raise FailedPrecondition(f"an expert version's digest must have {DIGEST_BYTES} bytes", field="digest")
    return versions
