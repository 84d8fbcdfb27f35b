"""Links to workers that have one way open beside grpcio, so that it is the one that is measured."""

from __future__ import annotations

from functools import partial

from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import DIRECT, GRPC, LANE, Way
from router.workers.transports.negotiate import open_ways
from router.workers.worker_link import WorkerLink


def pool_of(way: Way) -> ReplicaPool:
    """Empty: give it a routing table. It takes the way only once its links have tried it and found it faster."""
    opening = partial(open_ways, use_lane=way == LANE, use_direct=way == DIRECT)
    return ReplicaPool(connect=partial(WorkerLink, open_ways=None if way == GRPC else opening))


def strays(pool: ReplicaPool, way: Way) -> list[str]:
    """The workers whose newest call went another way."""
    return [link.replica.worker for link in pool.links if link.traffic.transport != way]
