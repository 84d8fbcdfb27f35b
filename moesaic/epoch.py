"""What the model is: expert versions and the epoch.

The digest of an expert version is the sha256 of its kind, dtype and weights, so that the same weights have
the same digest in any checkpoint layout. An epoch names the version in every (layer, slot), the gate rows that
are not those of the model folder, and the fingerprint of that folder, which stands for everything else that
routers hold. Its id is the hash of all this: two processes with the same epoch id compute the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moesaic.errors import FailedPrecondition, InvalidArgument
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
class GateRow:
    """What scores one slot, in its effective form: normalised, and divided by its temperature."""

    values: bytes  # [D] float32, little-endian
    bias: float = 0.0
    selection_bias: float = 0.0

    def to_proto(self, address: ExpertAddress) -> common_pb2.GateRow:
        return common_pb2.GateRow(
            address=address_to_proto(address),
            values=self.values,
            bias=self.bias,
            selection_bias=self.selection_bias,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.GateRow) -> tuple[ExpertAddress, GateRow]:
        return address_from_proto(message.address), cls(message.values, message.bias, message.selection_bias)


@dataclass(frozen=True, slots=True)
class EpochBundle:
    """A bundle that brought experts of an epoch; requests name it, or one of its tags, in their policy."""

    name: str
    digest: bytes
    tags: tuple[str, ...]
    experts: tuple[ExpertAddress, ...]

    def to_proto(self) -> control_pb2.EpochBundle:
        return control_pb2.EpochBundle(
            name=self.name,
            digest=self.digest,
            tags=self.tags,
            experts=list(map(address_to_proto, self.experts)),
        )

    @classmethod
    def from_proto(cls, message: control_pb2.EpochBundle) -> EpochBundle:
        experts = tuple(map(address_from_proto, message.experts))
        return cls(message.name, message.digest, tuple(message.tags), experts)


@dataclass(frozen=True, slots=True)
class Epoch:
    """The immutable answer to "what is the model": just one version in every slot, and what scores it."""

    id: str
    model: str
    versions: Mapping[ExpertAddress, bytes]
    # Only the rows that are not those of the model folder.
    gate_rows: Mapping[ExpertAddress, GateRow] = field(default_factory=dict)
    bundles: tuple[EpochBundle, ...] = ()
    # The fingerprint of the model folder; empty for workers that were started by hand.
    base: bytes = b""

    @classmethod
    def of(
        cls,
        model: str,
        versions: Mapping[ExpertAddress, bytes],
        *,
        gate_rows: Mapping[ExpertAddress, GateRow] | None = None,
        bundles: Iterable[EpochBundle] = (),
        base: bytes = b"",
    ) -> Epoch:
        """The epoch with this content, whose id is the content's hash.

        Raises InvalidArgument with field `epoch` when a gate row or a bundle names a slot without a version.
        """
        epoch = cls(
            id="",
            model=model,
            versions=dict(sorted(versions.items())),
            gate_rows=dict(sorted((gate_rows or {}).items())),
            bundles=tuple(sorted(bundles, key=lambda bundle: bundle.name)),
            base=base,
        )
        named = {*epoch.gate_rows, *(address for bundle in epoch.bundles for address in bundle.experts)}
        if unknown := sorted(named - epoch.versions.keys()):
            layer, slot = unknown[0]
            raise InvalidArgument(f"epoch: layer {layer} slot {slot} has no version", field="epoch")
        content = epoch.to_proto().SerializeToString(deterministic=True)
        return replace(epoch, id=hashlib.sha256(b"moesaic epoch 2\0" + content).hexdigest()[:16])

    @property
    def expert_versions(self) -> frozenset[ExpertVersion]:
        """The versions as keys."""
        return frozenset(map(ExpertVersion._make, self.versions.items()))

    def to_proto(self) -> control_pb2.Epoch:
        return control_pb2.Epoch(
            id=self.id,
            model=self.model,
            experts=versions_to_proto(self.expert_versions),
            gate_rows=[row.to_proto(address) for address, row in self.gate_rows.items()],
            bundles=[bundle.to_proto() for bundle in self.bundles],
            base=self.base,
        )

    @classmethod
    def from_proto(cls, message: control_pb2.Epoch) -> Epoch:
        """Raises FailedPrecondition if the id is not the hash of the content, or a slot is named twice."""
        versions: dict[ExpertAddress, bytes] = {}
        for address, digest in map(version_from_proto, message.experts):
            if address in versions:
                raise FailedPrecondition(
                    f"the epoch names layer {address.layer} slot {address.slot} more than once",
                    field="epoch.experts",
                )
            versions[address] = digest
        epoch = cls.of(
            message.model,
            versions,
            gate_rows=dict(map(GateRow.from_proto, message.gate_rows)),
            bundles=map(EpochBundle.from_proto, message.bundles),
            base=message.base,
        )
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


def address_to_proto(address: ExpertAddress) -> common_pb2.ExpertAddress:
    return common_pb2.ExpertAddress(layer=address.layer, slot=address.slot)


def address_from_proto(message: common_pb2.ExpertAddress) -> ExpertAddress:
    return ExpertAddress(message.layer, message.slot)


def versions_to_proto(versions: Iterable[ExpertVersion]) -> list[common_pb2.ExpertVersion]:
    """Ordered by layer, slot and digest."""
    return [version_to_proto(version) for version in sorted(versions)]


def version_to_proto(version: ExpertVersion) -> common_pb2.ExpertVersion:
    address, digest = version
    return common_pb2.ExpertVersion(address=address_to_proto(address), digest=digest)


def versions_from_proto(messages: Iterable[common_pb2.ExpertVersion]) -> frozenset[ExpertVersion]:
    """Raises FailedPrecondition for a digest of the wrong length."""
    return frozenset(map(version_from_proto, messages))


def version_from_proto(message: common_pb2.ExpertVersion) -> ExpertVersion:
    """Raises FailedPrecondition for a digest of the wrong length."""
    if len(message.digest) != DIGEST_BYTES:
        raise FailedPrecondition(f"an expert version's digest must have {DIGEST_BYTES} bytes", field="digest")
    return ExpertVersion(address_from_proto(message.address), message.digest)
