"""Which replicas there are now, and which of them a call goes to.

Follows the routing table: a new revision opens links to new incarnations and closes those that are gone. Choice is by
fewest calls in flight; a replica whose last call failed is left alone for a moment unless there is no other.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from moesaic.epoch import Epoch, ExpertAddress
from moesaic.routing_table import Replica, RoutingTable
from router.workers.worker_link import WorkerLink

# How long a replica that failed is passed over while another holds the expert.
SHUN_S = 1.0


class ReplicaPool:
    """Links to all replicas of the newest routing table. `update` may run beside `pick`."""

    def __init__(
        self,
        *,
        connect: Callable[[Replica], WorkerLink] = WorkerLink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()
        self._revision = -1
        self._links: dict[str, WorkerLink] = {}
        # The same, ordered by worker name, and by what they hold; replaced as a whole, so that readers need no lock.
        self._ordered: tuple[WorkerLink, ...] = ()
        self._holders: Mapping[tuple[ExpertAddress, bytes], tuple[WorkerLink, ...]] = {}
        self._shunned_until: dict[str, float] = {}

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        """All links, ordered by worker name."""
        return self._ordered

    def update(self, table: RoutingTable) -> None:
        """Takes a newer table; an older one is ignored."""
        with self._lock:
            if table.revision <= self._revision:
                return
            self._revision = table.revision
            wanted = {replica.incarnation: replica for replica in table.replicas}
            gone = [self._links.pop(key) for key in self._links.keys() - wanted.keys()]
            for incarnation in wanted.keys() - self._links.keys():
                self._links[incarnation] = self._connect(wanted[incarnation])
            self._ordered = tuple(sorted(self._links.values(), key=lambda link: link.replica.worker))
            self._holders = _by_expert(self._ordered)
        for link in gone:
            link.close()

    def pick(
        self, address: ExpertAddress, digest: bytes, *, exclude: Collection[str] = ()
    ) -> WorkerLink | None:
        """The link to call for an expert version, none of the workers in `exclude`; None when nobody holds it."""
        holders = self._holders.get((address, digest), ())
        if exclude:
            holders = tuple(link for link in holders if link.replica.worker not in exclude)
        if len(holders) <= 1:
            return holders[0] if holders else None
        now = self._clock()
        return min(
            holders,
            key=lambda link: (
                self._shunned_until.get(link.replica.incarnation, 0.0) > now,
                link.num_in_flight,
            ),
        )

    def shun(self, link: WorkerLink) -> None:
        """Remembers that a call to this replica just failed."""
        self._shunned_until[link.replica.incarnation] = self._clock() + SHUN_S

    def missing(self, epoch: Epoch) -> list[tuple[ExpertAddress, bytes]]:
        """Experts of the epoch that no replica holds."""
        holders = self._holders
        return [expert for expert in epoch.versions.items() if expert not in holders]

    def close(self) -> None:
        for link in self.links:
            link.close()


def _by_expert(links: Sequence[WorkerLink]) -> Mapping[tuple[ExpertAddress, bytes], tuple[WorkerLink, ...]]:
    """Who holds an expert version, in the order of `links`."""
    holders: defaultdict[tuple[ExpertAddress, bytes], list[WorkerLink]] = defaultdict(list)
    for link in links:
        for expert in link.replica.versions.items():
            holders[expert].append(link)
    return {expert: tuple(those) for expert, those in holders.items()}
