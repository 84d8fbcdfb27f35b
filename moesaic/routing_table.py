"""Where the model is: an immutable snapshot of the replicas that are ready now.

A routing table is replaced as a whole, never patched, and the newest one is always used, so that failover
works inside a pinned epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.epoch import Epoch, ExpertVersion, versions_from_proto, versions_to_proto
from moesaic.v1 import control_pb2, expert_pb2


@dataclass(frozen=True, slots=True)
class Replica:
    """One running worker: its name, its address, the id of this start, and the versions that it holds.

    It may hold several versions of one slot.
    """

    worker: str
    address: str
    incarnation: str
    holdings: frozenset[ExpertVersion]

    @classmethod
    def from_description(cls, address: str, description: expert_pb2.DescribeResponse) -> Replica:
        """The worker that answers `description` at `address`."""
        return cls(
            description.worker, address, description.incarnation, versions_from_proto(description.experts)
        )

    def to_proto(self) -> control_pb2.Replica:
        return control_pb2.Replica(
            worker=self.worker,
            address=self.address,
            incarnation=self.incarnation,
            experts=versions_to_proto(self.holdings),
        )

    @classmethod
    def from_proto(cls, message: control_pb2.Replica) -> Replica:
        return cls(message.worker, message.address, message.incarnation, versions_from_proto(message.experts))


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """All replicas that are ready. `revision` grows with every change."""

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
class Canary:
    """An epoch that is tried on a `share` of the requests. Of the others' rows, `shadow_share` also go to its experts,
    whose answers are compared and never used. Both shares are in [0, 1]."""

    epoch: Epoch
    share: float
    shadow_share: float = 0.0

    def to_proto(self) -> control_pb2.Canary:
        return control_pb2.Canary(
            epoch=self.epoch.to_proto(), share=self.share, shadow_share=self.shadow_share
        )

    @classmethod
    def from_proto(cls, message: control_pb2.Canary) -> Canary:
        return cls(Epoch.from_proto(message.epoch), message.share, message.shadow_share)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the model is (None while the workers make no epoch) and where it is."""

    epoch: Epoch | None
    table: RoutingTable
    # None while no epoch is on trial.
    canary: Canary | None = None
    # How long a sequence may still run in an epoch that is neither the current one nor the canary's; None: until its end.
    drain_s: float | None = None

    def to_proto(self) -> control_pb2.WatchResponse:
        message = control_pb2.WatchResponse(
            routing_table=self.table.to_proto(), drain_s=0.0 if self.drain_s is None else self.drain_s
        )
        if self.epoch is not None:
            message.epoch.CopyFrom(self.epoch.to_proto())
        if self.canary is not None:
            message.canary.CopyFrom(self.canary.to_proto())
        return message

    @classmethod
    def from_proto(cls, message: control_pb2.WatchResponse) -> Snapshot:
        return cls(
            Epoch.from_proto(message.epoch) if message.epoch.id else None,
            RoutingTable.from_proto(message.routing_table),
            Canary.from_proto(message.canary) if message.HasField("canary") else None,
            message.drain_s or None,
        )
