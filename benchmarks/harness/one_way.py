"""Links to workers that have one way open beside grpcio, so that it is the one that is measured."""

from __future__ import annotations

from functools import partial

from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import DIRECT, GRPC, SHARED_MEMORY, TransportKind
from router.workers.transports.negotiate import open_transports
from router.workers.worker_link import WorkerLink


def pool_of(way: TransportKind) -> ReplicaPool:
    """Empty: give it a routing table. It takes the way only once its links have tried it and found it faster."""
    opening = partial(open_transports, use_shared_memory=way == SHARED_MEMORY, use_direct=way == DIRECT)
    return ReplicaPool(connect=partial(WorkerLink, open_transports=None if way == GRPC else opening))


def strays(pool: ReplicaPool, way: TransportKind) -> list[str]:
    """The workers whose newest call went another way."""
    return [link.replica.worker for link in pool.links if link.traffic.transport != way]
