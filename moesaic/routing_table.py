"""Where the model is: an immutable snapshot of the replicas that are ready now.

A routing table is replaced as a whole, never patched, and the newest is always used, so that failover works inside a
pinned epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.epoch import Epoch, ExpertAddress, versions_from_proto, versions_to_proto
from moesaic.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class Replica:
    """One running worker: its name, address, the id of this very start, and the versions it holds."""

    worker: str
    address: str
    incarnation: str
    versions: Mapping[ExpertAddress, bytes]

    def holds(self, address: ExpertAddress, digest: bytes) -> bool:
        return self.versions.get(address) == digest

    def to_proto(self) -> control_pb2.Replica:
        return control_pb2.Replica(
            worker=self.worker,
            address=self.address,
            incarnation=self.incarnation,
            experts=versions_to_proto(self.versions),
        )

    @classmethod
    def from_proto(cls, message: control_pb2.Replica) -> Replica:
        return cls(message.worker, message.address, message.incarnation, versions_from_proto(message.experts))


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """All ready replicas; `revision` grows with every change."""

    revision: int
    replicas: tuple[Replica, ...]

    def to_proto(self) -> control_pb2.RoutingTable:
        return control_pb2.RoutingTable(
            revision=self.revision, replicas=[replica.to_proto() for replica in self.replicas]
        )

    @classmethod
    def from_proto(cls, message: control_pb2.RoutingTable) -> RoutingTable:
        return cls(message.revision, tuple(Replica.from_proto(replica) for replica in message.replicas))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What routers follow: what the model is (None while some expert is held by nobody) and where it is."""

    epoch: Epoch | None
    table: RoutingTable
