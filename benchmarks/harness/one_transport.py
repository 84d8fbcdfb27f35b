"""A pool whose links open a single transport, so that it is the one that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import DIRECT, GRPC, SHARED_MEMORY, TransportKind
from router.workers.transports.negotiate import open_transports
from router.workers.worker_link import WorkerLink

OPEN_TIMEOUT_S = 20.0


def pool_of(kind: TransportKind) -> ReplicaPool:
    """A pool without a routing table. Its links open the transport in the background, after their first answer."""
    opening = partial(open_transports, use_shared_memory=kind == SHARED_MEMORY, use_direct=kind == DIRECT)
    return ReplicaPool(connect=partial(WorkerLink, open_transports=None if kind == GRPC else opening))


def call_until_open(pool: ReplicaPool, kind: TransportKind, call: Callable[[], object]) -> None:
    """Calls until all links take the transport. Raises SystemExit where one does not."""
    ends_s = time.monotonic() + OPEN_TIMEOUT_S
    while any(link.traffic.transport != kind for link in pool.links):
        if time.monotonic() > ends_s:
            raise SystemExit(f"this transport was not opened: {kind}")
        call()
        time.sleep(0.01)
