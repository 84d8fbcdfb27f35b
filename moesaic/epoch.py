"""What the model is: expert versions and the epoch.

The digest of an expert version is the sha256 of its kind, dtype and weights, so that the same weights have
the same digest in any checkpoint layout. An epoch names the version in every (layer, slot), and its id is the
hash of that table and of the model's name. Two processes with the same epoch id therefore compute with the
same experts; the hash covers neither the gates nor the dense weights, which every router reads from the model
folder.
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


class ExpertVersion(NamedTuple):
    """One version of an expert. It is always a key: a worker may hold several versions of one slot."""

    address: ExpertAddress
    digest: bytes


class VersionHasher:
    """Builds the digest of an expert version from its weights, which are added in the order of the kind."""

    def __init__(self, kind: str, dtype: str) -> None:
        self._hash = hashlib.sha256(f"moesaic expert version 1\0{kind}\0{dtype}\0".encode())

    def update(self, name: str, shape: tuple[int, ...], data: memoryview | bytes) -> None:
        """Adds one weight: its name within the kind, its shape and its little-endian bytes."""
        self._hash.update(f"{name}\0{'x'.join(map(str, shape))}\0".encode())
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


@dataclass(frozen=True, slots=True)
class Epoch:
    """The immutable answer to "what is the model": just one version in every slot."""

    id: str
    model: str
    versions: Mapping[ExpertAddress, bytes]

    @classmethod
    def of(cls, model: str, versions: Mapping[ExpertAddress, bytes]) -> Epoch:
        """The epoch with these versions, whose id is the hash of its content."""
        ordered = dict(sorted(versions.items()))
        content = hashlib.sha256(f"moesaic epoch 1\0{model}\0".encode())
        for address, digest in ordered.items():
            content.update(f"{address.layer}.{address.slot}=".encode() + digest)
        return cls(content.hexdigest()[:16], model, ordered)

    @property
    def expert_versions(self) -> frozenset[ExpertVersion]:
        """The versions as keys."""
        return frozenset(map(ExpertVersion._make, self.versions.items()))

    def to_proto(self) -> control_pb2.Epoch:
        return control_pb2.Epoch(
            id=self.id, model=self.model, experts=versions_to_proto(self.expert_versions)
        )

    @classmethod
    def from_proto(cls, message: control_pb2.Epoch) -> Epoch:
        """Raises FailedPrecondition if the id is not the hash of the content, or a slot is named twice."""
        versions: dict[ExpertAddress, bytes] = {}
        for address, digest in map(_version_from_proto, message.experts):
            if address in versions:
                raise FailedPrecondition(
                    f"the epoch names layer {address.layer} slot {address.slot} more than once",
                    field="epoch.experts",
                )
            versions[address] = digest
        epoch = cls.of(message.model, versions)
        if epoch.id != message.id:
            raise FailedPrecondition("the epoch's id is not the hash of its content", field="epoch.id")
        return epoch


def merge_versions(
    held: Iterable[Collection[ExpertVersion]], wanted: Collection[ExpertAddress]
) -> dict[ExpertAddress, bytes]:
    """The one version of each of the model's experts, `wanted`, out of what each worker holds.

    Raises FailedPrecondition where a slot is held in several versions, is held by no worker, or is not of the
    model.
    """
    versions: dict[ExpertAddress, bytes] = {}
    for address, digest in sorted(frozenset[ExpertVersion]().union(*held)):
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


def versions_to_proto(versions: Iterable[ExpertVersion]) -> list[common_pb2.ExpertVersion]:
    """Ordered by layer, slot and digest."""
    return [
        common_pb2.ExpertVersion(
            address=common_pb2.ExpertAddress(layer=address.layer, slot=address.slot), digest=digest
        )
        for address, digest in sorted(versions)
    ]


def versions_from_proto(messages: Iterable[common_pb2.ExpertVersion]) -> frozenset[ExpertVersion]:
    """Raises FailedPrecondition for a digest of the wrong length."""
    return frozenset(map(_version_from_proto, messages))


def _version_from_proto(message: common_pb2.ExpertVersion) -> ExpertVersion:
    if len(message.digest) != DIGEST_BYTES:
        raise FailedPrecondition(f"an expert version's digest must have {DIGEST_BYTES} bytes", field="digest")
    return ExpertVersion(ExpertAddress(message.address.layer, message.address.slot), message.digest)
