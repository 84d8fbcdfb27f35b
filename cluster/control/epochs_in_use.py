"""The epochs that routers may compute in: the head of the store, what is about to join it, and what still drains.

The store is asked once, at the start; from then on it is written through this class alone. Times are seconds on one
monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from cluster.control.epoch_store import Decision, EpochStore
from cluster.control.head import Head
from cluster.control.router_reports import RouterReports
from moesaic.epoch import Epoch, ExpertVersion
from moesaic.errors import NotFound

# How much longer than drain_s a retired epoch is kept for routers that say nothing.
MARGIN_S = 5.0


@dataclass(frozen=True, slots=True)
class _Retired:
    epoch: Epoch
    since_s: float


class EpochsInUse:
    """Starts with the head of the store, which has none before the first epoch."""

    def __init__(self, store: EpochStore, *, drain_s: float) -> None:
        self._store = store
        self._drain_s = drain_s
        self._head = store.head
        self._in_use = {} if self._head is None else {id: store.epoch(id) for id in self._head.in_use}
        self._retired: dict[str, _Retired] = {}
        # Those that were kept for as long as they may be.
        self._given_up: set[str] = set()
        self._known: set[ExpertVersion] = set()
        for epoch in (store.first(), *self._in_use.values()):
            self._known |= epoch.expert_versions if epoch is not None else set()
        # To be committed next: its versions are loaded already.
        self._candidate: Epoch | None = None

    @property
    def head(self) -> Head | None:
        return self._head

    @property
    def drain_s(self) -> float:
        return self._drain_s

    @property
    def current(self) -> Epoch | None:
        return None if self._head is None else self._in_use[self._head.current]

    @property
    def canary(self) -> Epoch | None:
        if self._head is None or self._head.canary is None:
            return None
        return self._in_use[self._head.canary.epoch]

    @property
    def previous(self) -> Epoch | None:
        """The epoch to which a rollback without a name goes back."""
        return self.find(self._head.previous) if self._head is not None and self._head.previous else None

    @property
    def candidate(self) -> Epoch | None:
        return self._candidate

    @property
    def known(self) -> Set[ExpertVersion]:
        """All versions that a worker may hold without being at fault."""
        return self._known

    def living(self) -> tuple[Epoch, ...]:
        """All epochs whose versions workers must hold, the most important first."""
        retired = (one.epoch for one in self._retired.values())
        epochs = (self.current, self.canary, self._candidate, *retired)
        return tuple({epoch.id: epoch for epoch in epochs if epoch is not None}.values())

    @property
    def is_draining(self) -> bool:
        return bool(self._retired)

    def is_retired(self, epoch_id: str) -> bool:
        """Whether sequences may still run in an epoch that is no longer in use."""
        return epoch_id in self._retired

    def is_living(self, epoch_id: str) -> bool:
        return any(epoch.id == epoch_id for epoch in self.living())

    def find(self, epoch_id: str) -> Epoch:
        """Raises NotFound with field `epoch`."""
        return self._in_use.get(epoch_id) or self._store.epoch(epoch_id)

    def prepare(self, epoch: Epoch | None) -> None:
        """Makes an epoch the candidate, or withdraws it."""
        self._candidate = epoch
        if epoch is not None:
            self._known |= epoch.expert_versions

    def commit(self, expected: Head | None, head: Head, decision: Decision, now_s: float) -> None:
        """Moves the head to epochs that are in use, or the candidate. Raises Aborted, FailedPrecondition."""
        known = {**self._in_use, **({self._candidate.id: self._candidate} if self._candidate else {})}
        in_use = {epoch_id: known[epoch_id] for epoch_id in head.in_use}
        self._store.commit(expected, head, decision, self._candidate)
        for epoch_id in self._in_use.keys() - in_use.keys():
            self._retired[epoch_id] = _Retired(self._in_use[epoch_id], now_s)
        for epoch_id in in_use:
            self._retired.pop(epoch_id, None)
            self._given_up.discard(epoch_id)
        self._head, self._in_use, self._candidate = head, in_use, None

    def note_pinned(self, epoch_ids: Iterable[str], now_s: float) -> None:
        """Routers have sequences in these epochs: those that this controller did not know of live again."""
        for epoch_id in epoch_ids:
            if self.is_living(epoch_id) or epoch_id in self._given_up:
                continue
            try:
                epoch = self._store.epoch(epoch_id)
            except NotFound:  # of a cluster that had this address before
                self._given_up.add(epoch_id)
                continue
            self._retired[epoch_id] = _Retired(epoch, now_s)
            self._known |= epoch.expert_versions

    def release(self, reports: RouterReports, now_s: float) -> list[str]:
        """Ends the retired epochs that no router needs any more, or that were kept long enough; says which."""
        ended = [
            epoch_id
            for epoch_id, retired in self._retired.items()
            if reports.released(epoch_id, retired.since_s) or self._is_overdue(retired, now_s)
        ]
        for epoch_id in ended:
            if self._is_overdue(self._retired.pop(epoch_id), now_s):
                self._given_up.add(epoch_id)
        return ended

    def _is_overdue(self, retired: _Retired, now_s: float) -> bool:
        return now_s > retired.since_s + self._drain_s + MARGIN_S
