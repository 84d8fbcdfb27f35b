"""The links to replicas, and the choice of the one that a call goes to.

A link is opened once per incarnation; what a replica holds comes from the newest table that lists it. A table
decides who is preferred, and the links themselves decide who is alive: a replica that the newest table does not
list keeps its link while the connection is open, and is called where no other replica can be. A controller that
slept or was cut off thus takes no worker away that still answers.

Every replica has a circuit (circuit.py): one that fails is not called until it has answered a probe. Of the others
the one that is expected to answer first is called: (calls in flight + 1) times its slowness. Calls alternate between
replicas that are equal, and what one wave asks of them is divided between them once it is worth a message of its own.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.errors import DataLoss, MoesaicError, Overloaded
from moesaic.routing_table import Replica, RoutingTable
from router.workers.call_times import CallTimes
from router.workers.circuit import Circuit, CircuitState
from router.workers.slowness import Slowness
from router.workers.worker_link import WorkerLink

log = logging.getLogger(__name__)

# How long a replica that is overloaded is passed over while another one holds the expert version.
BUSY_S = 1.0
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
    circuit: Circuit
    # Whether that is the newest table.
    listed: bool = True
    slowness: Slowness = field(default_factory=Slowness)
    # Until when it is passed over because it was overloaded.
    busy_until_s: float = 0.0
    # The number of its last turn, by which equal members alternate.
    last_turn: int = 0
    # When its last call failed; None while it is well.
    failed_s: float | None = None
    # Why its last failed call failed; empty while none did.
    last_error: str = ""
    # The version of which it gave a wrong answer last, and with which it is probed then.
    wrong_version: ExpertVersion | None = None


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """What a router thinks of a replica."""

    link: WorkerLink
    circuit: CircuitState
    last_error: str


@dataclass(frozen=True, slots=True)
class DueProbe:
    """A replica that is to be probed, with one of its versions; and whether it gave a wrong answer of that one."""

    link: WorkerLink
    version: ExpertVersion
    is_blamed: bool


_Holders = Mapping[ExpertVersion, tuple[_Member, ...]]


class ReplicaPool:
    """The links to all replicas that are listed or answer. `pick` is for the engine's thread; the rest may run beside
    it. Notes need no lock: each is a few assignments, and any order of them leaves a valid state."""

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
        self._times = CallTimes()
        # The members and the links ordered by worker, and the members that hold an expert version in the same order. All
        # are replaced as a whole, so that readers need no lock.
        self._ordered_members: tuple[_Member, ...] = ()
        self._ordered: tuple[WorkerLink, ...] = ()
        self._holders: _Holders = {}
        # The versions that one member alone holds; None: all of them.
        self._sole: frozenset[ExpertVersion] | None = None
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

    def have_another_holder(self, versions: Iterable[ExpertVersion]) -> bool:
        """Whether there is another replica of each of these versions to turn to."""
        sole = self._sole
        return sole is not None and (not sole or sole.isdisjoint(versions))

    def update(self, table: RoutingTable) -> None:
        """Replaces the table by a newer one; an older one is ignored."""
        with self._lock:
            if table.revision <= self._revision:
                return
            self._revision = table.revision
            for replica in table.replicas:
                member = self._members.pop(replica.incarnation, None)
                if member is None:
                    circuit = Circuit(self._clock())
                    member = _Member(self._connect(replica), replica.holdings, circuit)
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
        """The link to call for an expert version; None if no incarnation but those in `exclude` holds it and is to be
        called. `planned` are the rows that the same wave asks of each link so far."""
        holders = [
            holder
            for holder in self._holders.get(ExpertVersion(address, digest), ())
            if holder.circuit.lets_calls_through and holder.link.replica.incarnation not in exclude
        ]
        if len(holders) <= 1:
            return holders[0].link if holders else None
        now_s, planned = self._clock(), planned or {}

        def preference(member: _Member) -> tuple[bool, bool, float, bool, int]:
            link = member.link
            work = link.num_in_flight + planned.get(link, 0) // SHARE_ROWS + 1
            return (
                not member.circuit.is_closed or member.busy_until_s > now_s,
                not member.listed,
                work * member.slowness.factor(now_s),
                link not in planned,
                member.last_turn,
            )

        chosen = min(holders, key=preference)
        chosen.last_turn = next(self._turns)
        return chosen.link

    def late_s(self, num_rows: int) -> float | None:
        """The seconds that nearly all calls of this size take at most; None while too few were made."""
        return self._times.late_s(num_rows)

    def note_answer(self, link: WorkerLink, num_rows: int, seconds: float) -> None:
        """This replica just gave an answer that is right in all that can be checked, after so many seconds."""
        ratio = self._times.add(num_rows, seconds)
        member = self._members.get(link.replica.incarnation)
        if member is None:
            return
        now_s = self._clock()
        if ratio is not None:
            member.slowness.note(ratio, now_s)
        member.circuit.note_right(now_s)
        if member.failed_s is not None and now_s - member.failed_s >= WELL_AFTER_S:
            member.failed_s = None
            log.info("a worker answers again", extra={"fields": _fields(link)})

    def note_late(self, link: WorkerLink, num_rows: int, seconds: float) -> None:
        """Another replica was asked in place of this one and answered first, after so many seconds."""
        link.traffic.hedged_calls += 1
        ratio = self._times.add(num_rows, seconds)
        member = self._members.get(link.replica.incarnation)
        if member is not None:
            now_s = self._clock()
            if ratio is not None:
                member.slowness.note(ratio, now_s)
            member.circuit.note_late(now_s)

    def note_failure(self, link: WorkerLink, error: Exception) -> None:
        """A call to this replica just failed. One that no table lists is dropped, unless it said itself that it is
        overloaded."""
        member = self._members.get(link.replica.incarnation)
        if member is None:
            return
        now_s = self._clock()
        self._note_trouble(member, _reason(error), now_s)
        if isinstance(error, Overloaded):
            member.busy_until_s = now_s + BUSY_S
            return
        if isinstance(error, TimeoutError):
            member.circuit.open(now_s)
        else:
            member.circuit.note_failure(now_s)
        self._drop(lambda other: other is member)

    def note_doubt(self, link: WorkerLink, error: MoesaicError) -> None:
        """This replica gave an answer that is wrong; whether by its fault or by that of the version is not known."""
        member = self._members.get(link.replica.incarnation)
        if member is not None:
            now_s = self._clock()
            self._note_trouble(member, error.message, now_s)
            member.circuit.suspect(now_s)

    def note_wrong(self, link: WorkerLink, reason: str, version: ExpertVersion) -> None:
        """This replica gave an answer of a version that is certainly wrong, and its own fault."""
        member = self._members.get(link.replica.incarnation)
        if member is not None:
            self._note_wrong(member, reason, version)
            self._drop(lambda other: other is member)

    def due_probes(self) -> list[DueProbe]:
        """The replicas to probe now. Each of them is reported by `note_probe`, whatever becomes of it."""
        now_s = self._clock()
        due = []
        for member in self._ordered_members:
            # What is on its way will tell of a replica that is well.
            is_asked = member.circuit.is_closed and member.link.num_in_flight
            if member.holdings and not is_asked and member.circuit.is_probe_due(now_s):
                member.circuit.begin_probe()
                blamed = member.wrong_version if member.wrong_version in member.holdings else None
                version = next(iter(member.holdings)) if blamed is None else blamed
                due.append(DueProbe(member.link, version, blamed is not None))
        return due

    def note_probe(self, probe: DueProbe, error: Exception | None) -> None:
        """What became of a probe: DataLoss for a wrong answer, another error for none, None for a right one."""
        member = self._members.get(probe.link.replica.incarnation)
        if member is None:
            return
        now_s = self._clock()
        if error is None:
            self._note_back(member, now_s)
        else:
            self._note_trouble(member, _reason(error), now_s)
            member.circuit.fail_probe(now_s, is_silent=isinstance(error, TimeoutError))
            if isinstance(error, DataLoss):
                self._note_wrong(member, error.message, probe.version)

    def health(self) -> list[ReplicaHealth]:
        """By replica, ordered by worker name."""
        return [ReplicaHealth(one.link, one.circuit.state, one.last_error) for one in self._ordered_members]

    def missing(self, epoch: Epoch) -> list[ExpertVersion]:
        """The expert versions of the epoch that no replica holds."""
        return sorted(epoch.expert_versions - self._holders.keys())

    def last_worker(self, address: ExpertAddress) -> str | None:
        """The name of a worker that holds the expert, or was the last to do so; None if none ever did."""
        return self._last_workers.get(address)

    def close(self) -> None:
        _close(self.links)

    def _note_trouble(self, member: _Member, reason: str, now_s: float) -> None:
        if member.failed_s is None:
            log.warning("a worker fails", extra={"fields": _fields(member.link) | {"reason": reason}})
        member.failed_s, member.last_error = now_s, reason

    def _note_wrong(self, member: _Member, reason: str, version: ExpertVersion) -> None:
        now_s = self._clock()
        self._note_trouble(member, reason, now_s)
        member.wrong_version = version
        if member.circuit.note_wrong(now_s):
            log.error(
                "a worker is not called any more: its answers are wrong",
                extra={"fields": _fields(member.link) | {"reason": reason}},
            )

    def _note_back(self, member: _Member, now_s: float) -> None:
        was_called = member.circuit.lets_calls_through
        member.circuit.pass_probe(now_s)
        member.wrong_version = None
        if not was_called:
            log.info("a worker is called again", extra={"fields": _fields(member.link)})

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
        members = sorted(self._members.values(), key=_order)
        holders: defaultdict[ExpertVersion, list[_Member]] = defaultdict(list)
        for member in members:
            for version in member.holdings:
                holders[version].append(member)
                self._last_workers[version.address] = member.link.replica.worker
        self._holders = {version: tuple(who) for version, who in holders.items()}
        sole = frozenset(version for version, who in holders.items() if len(who) == 1)
        self._sole = sole if len(sole) < len(holders) else None
        self._ordered_members = tuple(members)
        self._ordered = tuple(member.link for member in members)


def _order(member: _Member) -> tuple[str, str]:
    return member.link.replica.worker, member.link.replica.address


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
