"""Changes of the model: one at a time, from the order to the last drained sequence.

A change that was begun goes on when its caller leaves. Up to its commit it can be refused, and leaves nothing behind; the
next change may begin as soon as it is committed, while the old epoch still drains.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.control import next_epoch
from cluster.control.bundle_store import BundleStore
from cluster.control.change_order import ChangeOrder
from cluster.control.controller import Controller
from cluster.control.epoch_store import Decision, EpochStore
from cluster.control.epochs_in_use import EpochsInUse
from cluster.control.head import Head, Trial
from cluster.control.progress import Progress, Step
from cluster.control.reconciler import Reconciler
from cluster.control.router_reports import RouterReports
from moesaic.bundles import BaseModel, check_base
from moesaic.bundles.gate_row import effective_row
from moesaic.epoch import Epoch
from moesaic.errors import Aborted, FailedPrecondition, InternalError, MoesaicError, Unavailable
from moesaic.v1 import control_pb2

log = logging.getLogger(__name__)

POLL_S = 0.05
# How long a change waits until every router has it, before it says how many do and goes on.
SPREAD_S = 10.0


@dataclass(frozen=True, slots=True)
class _Goal:
    """What an order comes to: an epoch whose versions must be held, and the head that follows."""

    what: str
    epoch: Epoch
    head: Head
    bundle: str = ""


@dataclass(frozen=True, slots=True)
class _Running:
    order: ChangeOrder
    since_s: float


class Changes:
    """Carries out orders."""

    def __init__(
        self,
        controller: Controller,
        epochs: EpochsInUse,
        store: EpochStore,
        bundles: BundleStore,
        reconciler: Reconciler,
        reports: RouterReports,
        base: BaseModel,
        *,
        is_lasting: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_lasting`: whether the state folder outlives the cluster."""
        self._controller = controller
        self._epochs = epochs
        self._store = store
        self._bundles = bundles
        self._reconciler = reconciler
        self._reports = reports
        self._base = base
        self._is_lasting = is_lasting
        self._clock = clock
        self._running: _Running | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether a change runs that is not committed yet."""
        return self._running is not None

    def begin(self, order: ChangeOrder) -> Progress:
        """Begins a change. Raises Aborted if another one runs or the expected epoch is not current, and Unavailable
        while the cluster has no epoch."""
        head = self._epochs.head
        if head is None:
            raise Unavailable("the model is still being loaded", reason="NO_EPOCH", retry_after_s=1.0)
        if (running := self._running) is not None:
            raise Aborted(
                f"{running.order.operator or 'somebody'} began a {running.order.word} "
                f"{self._clock() - running.since_s:.0f} s ago, and changes are made one at a time; "
                f"epoch {head.current} is current",
                reason="CHANGE_RUNNING",
            )
        if order.expected_epoch and order.expected_epoch != head.current:
            raise Aborted(
                f"expected_epoch: epoch {head.current} is current, not {order.expected_epoch[:64]}",
                field="expected_epoch",
                reason="EPOCH_MOVED",
            )
        self._running = _Running(order, self._clock())
        progress = Progress()
        task = asyncio.create_task(self._carry_out(order, head, progress))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._note_end(task, progress))
        return progress

    def _note_end(self, task: asyncio.Task[None], progress: Progress) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            progress.end(_cut_off())

    async def stop(self) -> None:
        """Ends all changes where they are, and tells those who follow them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, order: ChangeOrder, head: Head, progress: Progress) -> None:
        try:
            try:
                goal = await self._reach(order, head, progress)
            finally:
                self._running = None
            await self._follow_up(goal, head, progress)
        except MoesaicError as error:
            progress.end(error)
        except Exception:  # the loop of this change: its followers must not wait for ever
            log.exception("a change failed")
            progress.end(InternalError("internal error"))
        else:
            progress.end()

    async def _reach(self, order: ChangeOrder, head: Head, progress: Progress) -> _Goal:
        """Up to the commit. A refusal is kept in the history."""
        try:
            progress.tell(Step(control_pb2.CHANGE_STAGE_VERIFY, "the change is checked"))
            goal = await self._goal(order, head)
            began_s = self._clock()
            await self._reconciler.bring(
                goal.epoch,
                lambda: self._commit(order, goal, head, began_s),
                lambda stage, detail, done=0, total=0: progress.tell(Step(stage, detail, done, total)),
            )
        except MoesaicError as error:
            log.warning("change refused", extra={"fields": {"change": order.word, "reason": error.message}})
            self._store.note(self._refusal(order, head, error))
            raise
        detail = (
            f"epoch {goal.epoch.id} is on trial"
            if goal.head.canary
            else f"epoch {goal.head.current} is current"
        )
        lost = "" if self._is_lasting else "; it ends with the cluster, which has no --state"
        progress.tell(self._step(control_pb2.CHANGE_STAGE_COMMIT, detail + lost, goal, head))
        return goal

    async def _goal(self, order: ChangeOrder, head: Head) -> _Goal:
        current = self._epochs.current
        assert current is not None
        match order.word:
            case "swap" | "add":
                return await self._goal_of_bundle(order, head, current)
            case "remove":
                epoch = next_epoch.remove(current, order.name, self._base)
                return _Goal("remove", epoch, head.move_to(epoch.id), order.name)
            case "promote":
                promoted = head.promote()
                return _Goal("promote", self._epochs.find(promoted.current), promoted)
            case "rollback":
                return self._goal_of_rollback(order, head, current)

    async def _goal_of_bundle(self, order: ChangeOrder, head: Head, current: Epoch) -> _Goal:
        bundle = await asyncio.to_thread(self._bundles.open, order.bundle)
        check_base(bundle, self._base)
        brought = {
            index: effective_row(bundle, expert.gate_row)
            for index, expert in enumerate(bundle.manifest.experts)
            if expert.gate_row is not None
        }
        rows = {**brought, **order.rows_of(bundle.manifest)}
        make = next_epoch.swap if order.word == "swap" else next_epoch.add
        epoch = make(current, bundle.manifest, bundle.digest, self._base, rows)
        name = bundle.manifest.name
        if order.canary is None:
            return _Goal(order.word, epoch, head.move_to(epoch.id), name)
        trial = Trial(epoch.id, order.canary.share, order.canary.shadow_share)
        return _Goal("canary", epoch, head.begin_trial(trial), name)

    def _goal_of_rollback(self, order: ChangeOrder, head: Head, current: Epoch) -> _Goal:
        if head.canary is not None:
            return _Goal("rollback", current, head.end_trial())
        target = order.epoch or head.previous
        if not target:
            raise FailedPrecondition(
                f"epoch: there is none before {head.current}", field="epoch", reason="NOTHING_BEFORE"
            )
        if target == head.current:
            raise FailedPrecondition(
                f"epoch: {target} is current already", field="epoch", reason="NOTHING_CHANGES"
            )
        epoch = self._epochs.find(target)
        self._check_bundles(epoch)
        return _Goal("rollback", epoch, head.move_to(target))

    def _check_bundles(self, epoch: Epoch) -> None:
        """An earlier epoch outlives its bundles."""
        gone = next((bundle.name for bundle in epoch.bundles if not self._bundles.has(bundle.digest)), None)
        if gone is not None:
            raise FailedPrecondition(
                f"epoch: {epoch.id} needs the bundle {gone}, which was forgotten: bring it again from its folder",
                field="epoch",
                reason="BUNDLE_FORGOTTEN",
            )

    def _commit(self, order: ChangeOrder, goal: _Goal, head: Head, began_s: float) -> None:
        detail = order.reason or f"after {self._clock() - began_s:.2f} s of loading and probing"
        previous = head.canary.epoch if goal.what == "rollback" and head.canary else head.current
        decision = Decision(goal.what, goal.epoch.id, previous, goal.bundle, order.operator, detail)
        self._epochs.commit(head, goal.head, decision, self._clock())

    def _refusal(self, order: ChangeOrder, head: Head, error: MoesaicError) -> Decision:
        bundle = order.name or order.bundle.hex()
        return Decision("refused", "", head.current, bundle, order.operator, f"{order.word}: {error.message}")

    async def _follow_up(self, goal: _Goal, head: Head, progress: Progress) -> None:
        def tell(stage: control_pb2.ChangeStage, detail: str, done: int = 0, total: int = 0) -> None:
            progress.tell(self._step(stage, detail, goal, head, done, total))

        await self._spread(goal.head, tell)
        left = next(iter(set(head.in_use) - set(goal.head.in_use)), None)
        if left is not None:
            await self._drain(left, tell)
        tell(control_pb2.CHANGE_STAGE_DONE, "done")

    async def _spread(self, head: Head, tell: Callable[..., None]) -> None:
        until_s = self._clock() + SPREAD_S
        while self._epochs.head == head:
            using, heard = self._reports.spread(head, self._clock())
            if heard and using == heard:
                tell(control_pb2.CHANGE_STAGE_SPREAD, f"all routers use it ({heard})", using, heard)
                return
            tell(control_pb2.CHANGE_STAGE_SPREAD, f"{using} of {heard} routers use it", using, heard)
            if self._clock() > until_s:
                return
            await asyncio.sleep(POLL_S)

    async def _drain(self, epoch: str, tell: Callable[..., None]) -> None:
        """Until no sequence of the epoch runs any more, and its versions are given up."""
        while self._epochs.is_retired(epoch):
            tell(control_pb2.CHANGE_STAGE_DRAIN, f"sequences of epoch {epoch} end")
            await asyncio.sleep(POLL_S)
        if not self._epochs.is_living(epoch):
            tell(control_pb2.CHANGE_STAGE_UNLOAD, "workers give the old experts up")
            await self._reconciler.wait_until_idle()

    def _step(
        self,
        stage: control_pb2.ChangeStage,
        detail: str,
        goal: _Goal,
        head: Head,
        done: int = 0,
        total: int = 0,
    ) -> Step:
        return Step(stage, detail, done, total, goal.epoch.id, head.current)


def _cut_off() -> Aborted:
    return Aborted(
        "the controller stopped in the middle of the change, which is whole or not at all: look at the history",
        reason="CONTROLLER_STOPPED",
    )
