"""The links to replicas, and the choice of the one that a call goes to.

A link is opened once per incarnation; what a replica holds comes from the newest table that lists it. A table
decides who is preferred, and the links themselves decide who is alive: a replica that the newest table does not
list keeps its link while the connection is open, and is called where no other replica can be. A controller that
slept or was cut off thus takes no worker away that still answers.

Calls alternate between replicas that are equal, and what one wave asks of them is divided between them once it
is worth a message of its own. A replica whose last call failed is passed over for a moment, unless no other one
holds the expert version.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.errors import MoesaicError, Overloaded
from moesaic.routing_table import Replica, RoutingTable
from router.workers.transports.base import HOST_SILENT
from router.workers.worker_link import WorkerLink

log = logging.getLogger(__name__)

# How long a replica that failed is passed over while another one holds the expert version.
BACK_OFF_S = 1.0
# The same for one whose host is silent: it costs whoever asks it seconds.
SILENT_BACK_OFF_S = 10.0
# How long a replica has to answer without a failure before it counts as well again.
WELL_AFTER_S = 10.0
# So many rows of a wave go to one replica before the next one gets a message, too.
SHARE_ROWS = 64
# Links that are kept although the newest table does not list their replicas. Those that were listed last stay.
MAX_UNLISTED = 64


@dataclass(slots=True, eq=False)
class _Member:
    """A link, and what decides whether it is called."""

    link: WorkerLink
    # From the newest table that listed it.
    holdings: frozenset[ExpertVersion]
    # Whether that is the newest table.
    listed: bool = True
    backed_off_until_s: float = 0.0
    # The number of its last turn, by which equal members alternate.
    last_turn: int = 0
    # When its last call failed; None while it is well.
    failed_s: float | None = None


_Holders = Mapping[ExpertVersion, tuple[_Member, ...]]


class ReplicaPool:
    """The links to all replicas that are listed or answer. `pick` and the notes are for the engine's thread;
    the rest may run beside them."""

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
        # By incarnation. Those that are not listed come in the order in which they were listed last.
        self._members: dict[str, _Member] = {}
        self._turns = itertools.count(1)
        # The links ordered by worker, and the members that hold an expert version in the same order. Both are
        # replaced as a whole, so that readers need no lock.
        self._ordered: tuple[WorkerLink, ...] = ()
        self._holders: _Holders = {}
        self._replicated = False
        # By expert: the name of a worker that held it last, for the message when none does any more.
        self._last_workers: dict[ExpertAddress, str] = {}

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        """All links, ordered by worker name. Another tuple after every change of what the pool holds."""
        return self._ordered

    @property
    def revision(self) -> int:
        """That of the newest table; -1 before the first."""
        return self._revision

    @property
    def replicated(self) -> bool:
        """Whether every expert version that is held at all has another holder to turn to."""
        return self._replicated

    def update(self, table: RoutingTable) -> None:
        """Replaces the table by a newer one; an older one is ignored."""
        with self._lock:
            if table.revision <= self._revision:
                return
            self._revision = table.revision
            for replica in table.replicas:
                member = self._members.pop(replica.incarnation, None)
                if member is None:
                    member = _Member(self._connect(replica), replica.holdings)
                member.listed, member.holdings = True, replica.holdings
                self._members[replica.incarnation] = member
            gone = self._unlist(table)
            self._index()
        _close(gone)

    def prune(self) -> None:
        """Drops the replicas that no table lists and whose connection broke."""
        self._drop(lambda member: member.link.lost)

    def pick(
        self,
        address: ExpertAddress,
        digest: bytes,
        *,
        exclude: Collection[str] = (),
        planned: Mapping[WorkerLink, int] | None = None,
    ) -> WorkerLink | None:
        """The link to call for an expert version; None if no incarnation but those in `exclude` holds it.
        `planned` are the rows that the same wave asks of each link so far."""
        holders = self._holders.get(ExpertVersion(address, digest), ())
        if exclude:
            holders = tuple(one for one in holders if one.link.replica.incarnation not in exclude)
        if len(holders) <= 1:
            return holders[0].link if holders else None
        now_s, planned = self._clock(), planned or {}

        def preference(member: _Member) -> tuple[bool, bool, int, int, bool, int]:
            link = member.link
            return (
                member.backed_off_until_s > now_s,
                not member.listed,
                link.num_in_flight,
                planned.get(link, 0) // SHARE_ROWS,
                link not in planned,
                member.last_turn,
            )

        chosen = min(holders, key=preference)
        chosen.last_turn = next(self._turns)
        return chosen.link

    def note_answer(self, link: WorkerLink) -> None:
        """This replica just gave an answer that is right in all that can be checked."""
        member = self._members.get(link.replica.incarnation)
        if member is None or member.failed_s is None:
            return
        if self._clock() - member.failed_s >= WELL_AFTER_S:
            member.failed_s = None
            log.info("a worker answers again", extra={"fields": _fields(link)})

    def note_failure(self, link: WorkerLink, error: Exception) -> None:
        """A call to this replica just failed: others are preferred for a while. One that no table lists is dropped,
        unless it said itself that it is overloaded."""
        member = self._members.get(link.replica.incarnation)
        if member is None:
            return
        now_s = self._clock()
        is_silent = isinstance(error, MoesaicError) and error.reason == HOST_SILENT
        member.backed_off_until_s = now_s + (SILENT_BACK_OFF_S if is_silent else BACK_OFF_S)
        if member.failed_s is None:
            log.warning("a worker fails", extra={"fields": _fields(link) | {"reason": _reason(error)}})
        member.failed_s = now_s
        if not isinstance(error, Overloaded):
            self._drop(lambda other: other is member)

    def missing(self, epoch: Epoch) -> list[ExpertVersion]:
        """The expert versions of the epoch that no replica holds."""
        return sorted(epoch.expert_versions - self._holders.keys())

    def last_worker(self, address: ExpertAddress) -> str | None:
        """The name of a worker that holds the expert, or was the last to do so; None if none ever did."""
        return self._last_workers.get(address)

    def close(self) -> None:
        _close(self.links)

    def _unlist(self, table: RoutingTable) -> list[WorkerLink]:
        """Keeps or removes the members that the table does not list. Returns the links that were removed: those
        that are lost, those whose address has a new incarnation, and the oldest of too many."""
        incarnations = {replica.incarnation for replica in table.replicas}
        addresses = {replica.address for replica in table.replicas}
        unlisted = {key: member for key, member in self._members.items() if key not in incarnations}
        kept = [
            key
            for key, member in unlisted.items()
            if not member.link.lost and member.link.replica.address not in addresses
        ]
        for key in kept[-MAX_UNLISTED:]:
            unlisted.pop(key).listed = False
        return [self._members.pop(key).link for key in unlisted]

    def _drop(self, is_gone: Callable[[_Member], bool]) -> None:
        """Drops those of the members that no table lists."""
        with self._lock:
            gone = [key for key, member in self._members.items() if not member.listed and is_gone(member)]
            links = [self._members.pop(key).link for key in gone]
            if links:
                self._index()
        _close(links)

    def _index(self) -> None:
        members = sorted(
            self._members.values(),
            key=lambda member: (member.link.replica.worker, member.link.replica.address),
        )
        holders: defaultdict[ExpertVersion, list[_Member]] = defaultdict(list)
        for member in members:
            for version in member.holdings:
                holders[version].append(member)
                self._last_workers[version.address] = member.link.replica.worker
        self._holders = {version: tuple(who) for version, who in holders.items()}
        self._replicated = bool(holders) and all(len(who) > 1 for who in holders.values())
        self._ordered = tuple(member.link for member in members)


def _fields(link: WorkerLink) -> dict[str, str]:
    return {"worker": link.replica.worker, "address": link.replica.address}


def _reason(error: Exception) -> str:
    """Why a call failed, in words that an operator can act on."""
    if isinstance(error, MoesaicError):
        return error.message
    return "no answer in time"


def _close(links: Iterable[WorkerLink]) -> None:
    for link in links:
        link.close()
