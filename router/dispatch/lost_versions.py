"""The expert versions that nobody computes at the moment: those without a replica, and those that no replica has answered for.

What calls have shown counts for a moment only, and not after a change of the replicas: then they are asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion
from moesaic.errors import MoesaicError
from router.gating.model_view import ModelView
from router.workers.replica_pool import ReplicaPool
from router.workers.worker_link import WorkerLink

# Reasons of errors that may be gone with the next try: no replica, none that works, none that answers in time.
NO_REPLICA = "NO_REPLICA"
EXPERT_FAILED = "EXPERT_FAILED"
EXPERT_SILENT = "EXPERT_SILENT"
_MENDABLE = frozenset({NO_REPLICA, EXPERT_FAILED, EXPERT_SILENT})

# How long a version that nobody has computed is not asked for by those who can do without it.
LOST_S = 1.0


def is_mendable(error: MoesaicError) -> bool:
    """Whether an expert is missing for a reason that another try may find gone."""
    return error.reason in _MENDABLE


class LostVersions:
    """What is known of lost versions. Used by the engine's thread alone."""

    def __init__(self, pool: ReplicaPool, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        # Until when each version counts as lost.
        self._noted: dict[ExpertVersion, float] = {}
        # Of the epochs asked for: the versions without a replica, while the pool has these links.
        self._unheld: dict[str, frozenset[ExpertVersion]] = {}
        self._links: tuple[WorkerLink, ...] = pool.links
        # The number of times that a version was noted that did not count as lost.
        self.num_noted = 0

    def note(self, version: ExpertVersion) -> None:
        """No replica has computed it just now."""
        now_s = self._clock()
        self.num_noted += self._noted.get(version, 0.0) <= now_s
        self._noted[version] = now_s + LOST_S

    def slots_of(self, view: ModelView) -> Mapping[int, frozenset[int]]:
        """By layer, the slots of a view's epoch whose versions are lost; without the layers that lack none."""
        self._forget()
        lost = self._unheld_of(view.epoch)
        if self._noted:
            lost |= {version for version in self._noted if _is_in(version, view)}
        slots: dict[int, set[int]] = {}
        for version in lost:
            slots.setdefault(version.address.layer, set()).add(version.address.slot)
        return {layer: frozenset(of_layer) for layer, of_layer in slots.items()}

    def _forget(self) -> None:
        if self._pool.links is not self._links:
            self._links = self._pool.links
            self._noted.clear()
            self._unheld.clear()
        elif self._noted:
            now_s = self._clock()
            self._noted = {version: until_s for version, until_s in self._noted.items() if until_s > now_s}

    def _unheld_of(self, epoch: Epoch) -> frozenset[ExpertVersion]:
        if epoch.id not in self._unheld:
            self._unheld[epoch.id] = frozenset(self._pool.missing(epoch))
        return self._unheld[epoch.id]


def _is_in(version: ExpertVersion, view: ModelView) -> bool:
    address: ExpertAddress = version.address
    return view.versions.get(address.layer, {}).get(address.slot) == version.digest
