"""What a worker tells of itself, and how the controller sees it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.epoch import ExpertAddress
from moesaic.routing_table import Replica
from moesaic.v1 import expert_pb2


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A READY worker: what it holds, the bytes of that, and the bytes that further experts may take."""

    replica: Replica
    weight_bytes: int = 0
    available_bytes: int = 0

    @classmethod
    def from_description(cls, address: str, description: expert_pb2.DescribeResponse) -> WorkerFacts:
        """The worker that answers `description` at `address`."""
        replica = Replica.from_description(address, description)
        return cls(replica, description.weight_bytes, description.available_bytes)


@dataclass(frozen=True, slots=True)
class WorkerSighting:
    """A worker that answers, with its host and the slots that it serves out of its model folder."""

    facts: WorkerFacts
    host: str
    home: frozenset[ExpertAddress]
