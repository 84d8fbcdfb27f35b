"""The replicas of the newest routing table, and the choice of the one that a call goes to.

A link is opened once per incarnation and closed when the incarnation leaves the table; what a replica holds
always comes from the newest table. A call goes to the replica with the fewest calls in flight. A replica
whose last call failed is passed over for a moment, unless no other one holds the expert version.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.routing_table import Replica, RoutingTable
from router.workers.worker_link import WorkerLink

# How long a replica that failed is passed over while another one holds the expert version.
BACK_OFF_S = 1.0


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
        # The links ordered by worker name, and those that hold an expert version in the same order. Both are
        # replaced as a whole, so that readers need no lock.
        self._ordered: tuple[WorkerLink, ...] = ()
        self._holders: Mapping[tuple[ExpertAddress, bytes], tuple[WorkerLink, ...]] = {}
        self._backed_off_until: dict[str, float] = {}

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        """All links, ordered by worker name."""
        return self._ordered

    def update(self, table: RoutingTable) -> None:
        """Replaces the table by a newer one; an older one is ignored."""
        with self._lock:
            if table.revision <= self._revision:
                return
            self._revision = table.revision
            wanted = {replica.incarnation: replica for replica in table.replicas}
            gone = [self._links.pop(key) for key in self._links.keys() - wanted.keys()]
            for incarnation in wanted.keys() - self._links.keys():
                self._links[incarnation] = self._connect(wanted[incarnation])
            by_name = sorted(wanted.values(), key=lambda replica: replica.worker)
            self._ordered = tuple(self._links[replica.incarnation] for replica in by_name)
            self._holders = _links_by_version(
                (self._links[replica.incarnation], replica.holdings) for replica in by_name
            )
        for link in gone:
            link.close()

    def pick(
        self, address: ExpertAddress, digest: bytes, *, exclude: Collection[str] = ()
    ) -> WorkerLink | None:
        """The link to call for an expert version; None if no incarnation but those in `exclude` holds it."""
        holders = self._holders.get((address, digest), ())
        if exclude:
            holders = tuple(link for link in holders if link.replica.incarnation not in exclude)
        if len(holders) <= 1:
            return holders[0] if holders else None
        now = self._clock()
        return min(
            holders,
            key=lambda link: (
                self._backed_off_until.get(link.replica.incarnation, 0.0) > now,
                link.num_in_flight,
            ),
        )

    def back_off(self, link: WorkerLink) -> None:
        """A call to this replica just failed: other replicas are preferred for BACK_OFF_S."""
        self._backed_off_until[link.replica.incarnation] = self._clock() + BACK_OFF_S

    def missing(self, epoch: Epoch) -> list[ExpertVersion]:
        """The expert versions of the epoch that no replica holds."""
        return sorted(epoch.expert_versions - self._holders.keys())

    def close(self) -> None:
        for link in self.links:
            link.close()


def _links_by_version(
    holdings: Iterable[tuple[WorkerLink, frozenset[ExpertVersion]]],
) -> Mapping[tuple[ExpertAddress, bytes], tuple[WorkerLink, ...]]:
    """The links that hold each expert version, in the order of `holdings`."""
    holders: defaultdict[tuple[ExpertAddress, bytes], list[WorkerLink]] = defaultdict(list)
    for link, versions in holdings:
        for version in versions:
            holders[version].append(link)
    return {version: tuple(links) for version, links in holders.items()}
