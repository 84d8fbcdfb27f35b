"""The epochs that a router holds, and which of them computes a new request.

A request gets the current epoch or, by a hash of its session or its own id, the canary's. A sequence keeps its epoch to
its end; an epoch that is neither current nor on trial is held until its last sequence has ended, or its time is up.
An epoch that the controller names is used once replicas hold all of its experts. Used on the event loop alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from moesaic.epoch import Epoch, ExpertVersion
from moesaic.errors import FailedPrecondition, Unavailable
from moesaic.expert_policy import ExpertPolicy
from moesaic.routing_table import Canary, Snapshot
from router.dispatch.shadow import Shadow
from router.gating.model_view import EpochViews, ModelView
from router.gating.policy import LayerShape
from router.gating.sides import point_of

log = logging.getLogger(__name__)

# How long the epoch before stays in use while the named one lacks replicas. After that the controller's word counts:
# sequences then wait for an expert that is missing, or fail, as they do when a worker is lost.
ADOPT_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class _Trial:
    views: EpochViews
    canary: Canary


class EpochBook:
    """Which epochs are current, on trial, and still held for their sequences."""

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        hidden_size: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shapes = shapes
        self._hidden_size = hidden_size
        self._clock = clock
        self._current: EpochViews | None = None
        self._trial: _Trial | None = None
        # By id: the other epochs that are held, and when they were retired.
        self._retired: dict[str, tuple[EpochViews, float]] = {}
        self._drain_s: float | None = None
        # What the controller wants, and since when it waits for replicas.
        self._wanted: Epoch | None = None
        self._wanted_canary: Canary | None = None
        self._wanted_since_s = 0.0
        self._unfit: set[str] = set()

    @property
    def current(self) -> Epoch | None:
        """The epoch of new requests; None before the first."""
        return None if self._current is None else self._current.epoch

    @property
    def canary(self) -> Canary | None:
        return None if self._trial is None else self._trial.canary

    @property
    def held(self) -> tuple[Epoch, ...]:
        """All epochs that sequences may be computed in, the current one first."""
        return tuple(views.epoch for views in self._held().values())

    @property
    def shadow(self) -> Shadow | None:
        """Whose rows are shadowed, and by what."""
        if self._current is None or self._trial is None or not self._trial.canary.shadow_share:
            return None
        return Shadow(self._current.epoch.id, self._trial.views.plain, self._trial.canary.shadow_share)

    def plain_view(self) -> ModelView:
        """That of the current epoch without a policy. Raises Unavailable before the first epoch."""
        if self._current is None:
            raise _not_ready()
        return self._current.plain

    def choose(self, request_id: str, session_id: str, epoch: str, policy: ExpertPolicy | None) -> ModelView:
        """The view that computes a request. The sequence has to be submitted in the same turn of the event loop, so that
        its epoch cannot be given up in between.

        `session_id` or, without one, `request_id` decides between the current epoch and the canary's, unless `epoch`
        names one. Raises FailedPrecondition, field `epoch`, for one that is not held; Unavailable before the first
        epoch; and the errors of `resolve`, field `experts…`.
        """
        if self._current is None:
            raise _not_ready()
        if epoch:
            views = self._held().get(epoch)
            if views is None:
                raise FailedPrecondition(
                    "epoch: this router does not hold it; leave it empty for the current one",
                    field="epoch",
                    reason="EPOCH_UNKNOWN",
                )
            return views.of(policy)
        trial = self._trial
        on_trial = trial is not None and point_of(session_id or request_id) < trial.canary.share
        return (trial.views if trial is not None and on_trial else self._current).of(policy)

    def update(self, snapshot: Snapshot) -> None:
        """Takes what the controller says of epochs. `settle` puts it in use."""
        if snapshot.epoch is None:
            return
        self._drain_s = snapshot.drain_s
        wanted = snapshot.epoch.id, snapshot.canary and snapshot.canary.epoch.id
        known = self._wanted and self._wanted.id, self._wanted_canary and self._wanted_canary.epoch.id
        if wanted != known:
            self._wanted_since_s = self._clock()
            self._unfit.clear()
        self._wanted, self._wanted_canary = snapshot.epoch, snapshot.canary

    def settle(
        self, missing: Callable[[Epoch], Collection[ExpertVersion]], open_sequences: Mapping[str, int]
    ) -> list[str]:
        """Puts the named epochs in use as far as replicas hold them, and gives up the retired ones without sequences.
        Returns the ids of those whose sequences have to end now.

        `missing`: the versions of an epoch that no replica holds. `open_sequences`, by epoch.
        """
        if self._wanted is not None and self._is_due(self._wanted, missing):
            self._adopt(self._wanted)
        self._settle_canary(missing)
        now_s = self._clock()
        for epoch in [epoch for epoch in self._retired if not open_sequences.get(epoch)]:
            del self._retired[epoch]
        drain_s = self._drain_s
        return [
            epoch
            for epoch, (_, since_s) in self._retired.items()
            if drain_s is not None and now_s - since_s >= drain_s
        ]

    def _is_due(self, epoch: Epoch, missing: Callable[[Epoch], Collection[ExpertVersion]]) -> bool:
        """Whether an epoch that is not in use yet can be, or has to be."""
        if self._current is None or epoch.id == self._current.epoch.id:
            return self._current is None
        lacking = len(missing(epoch))
        if not lacking:
            return True
        is_late = self._clock() - self._wanted_since_s >= ADOPT_AFTER_S
        if is_late:
            log.error(
                "an epoch is used although experts have no worker",
                extra={"fields": {"epoch": epoch.id, "missing": lacking}},
            )
        return is_late

    def _adopt(self, epoch: Epoch) -> None:
        views = self._views(epoch)
        if views is None:
            return
        before, self._current = self._current, views
        self._retired.pop(epoch.id, None)
        if self._trial is not None and self._trial.views is views:
            self._trial = None
        if before is not None:
            self._retired[before.epoch.id] = before, self._clock()
        log.info("new requests get another epoch", extra={"fields": {"epoch": epoch.id}})

    def _settle_canary(self, missing: Callable[[Epoch], Collection[ExpertVersion]]) -> None:
        wanted = self._wanted_canary
        if wanted is not None and self.current is not None and wanted.epoch.id == self.current.id:
            wanted = None
        trial = self._trial
        if trial is not None and (wanted is None or wanted.epoch.id != trial.views.epoch.id):
            self._trial = None
            self._retired[trial.views.epoch.id] = trial.views, self._clock()
            log.info("a canary ended here", extra={"fields": {"epoch": trial.views.epoch.id}})
        if wanted is None or self._current is None:
            return
        if self._trial is None and missing(wanted.epoch):
            return
        views = self._views(wanted.epoch)
        if views is not None:
            self._trial = _Trial(views, wanted)
            self._retired.pop(wanted.epoch.id, None)

    def _views(self, epoch: Epoch) -> EpochViews | None:
        """Those of an epoch that is held, or new ones; None, and a line in the log, if the model cannot be it."""
        views = self._held().get(epoch.id)
        if views is not None or epoch.id in self._unfit:
            return views
        try:
            return EpochViews(epoch, self._shapes, self._hidden_size)
        except FailedPrecondition as error:
            self._unfit.add(epoch.id)
            log.error(
                "an epoch cannot be served here", extra={"fields": {"epoch": epoch.id, "why": error.message}}
            )
            return None

    def _held(self) -> dict[str, EpochViews]:
        held = [self._current, None if self._trial is None else self._trial.views]
        held += [views for views, _ in self._retired.values()]
        return {views.epoch.id: views for views in held if views is not None}


def _not_ready() -> Unavailable:
    return Unavailable("the cluster serves no epoch yet", reason="NOT_READY", retry_after_s=1.0)
