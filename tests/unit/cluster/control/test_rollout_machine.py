"""Whatever operators, crashes and restarts do in whatever order: one valid epoch, and nobody is told of what is not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.played_base import base_model, write_played_bundle
from support.rollout_world import Crash, PlayedWorker, World

from cluster.control import bundle_store, epoch_store, forgetting, reconciler
from cluster.control.change_order import ChangeOrder, ChangeWord, Shares
from cluster.control.epoch_store import Decision
from cluster.control.head import Head, Trial
from moesaic.bundles import Bundle, verification
from moesaic.bundles.kinds import OWN_KINDS
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import Aborted, MoesaicError

# Half a minute of one core, which a busy machine may not have to itself.
pytestmark = pytest.mark.timeout(900)

# 200 runs of 50 steps; MOESAIC_ROLLOUT_RUNS asks for more.
RUNS = int(os.environ.get("MOESAIC_ROLLOUT_RUNS", "200"))
STEPS = 50
# The store forces every commit to the disk, which 10,000 steps on a slow one would take minutes for.
MEMORY = Path("/dev/shm")
FAILPOINTS = (*epoch_store.FAILPOINTS, *bundle_store.FAILPOINTS, *reconciler.FAILPOINTS)
BASE = base_model()

BUNDLES = {
    "legal": [(0, 0), (1, 0)],
    "legal-2": [(0, 0)],
    "law": [(0, 1), (1, 2)],
    "fifth": [(0, 3)],
    "maths": [(0, None), (1, None)],
    "poems": [(0, None)],
}
NAMES = st.sampled_from(sorted(BUNDLES))
OPERATORS = st.sampled_from(["ann", "bob"])


@pytest.fixture(scope="module", autouse=True)
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("bundles")
    for name, targets in BUNDLES.items():
        RolloutMachine.made[name] = write_played_bundle(folder / name, BASE, name, targets)
    with pytest.MonkeyPatch.context() as patch:
        # The thousands of uploads need not look through all installed packages each.
        patch.setattr(verification, "installed_kinds", lambda: OWN_KINDS)
        yield
    RolloutMachine.made.clear()


def workers(room: int) -> list[PlayedWorker]:
    """Three on two hosts, each slot on two of them."""
    slots = {"w0": (0, 1), "w1": (1, 2), "w2": (2, 0)}
    return [
        PlayedWorker(
            name,
            "b" if name == "w2" else "a",
            frozenset(ExpertAddress(layer, slot) for layer in (0, 1) for slot in held),
            room,
        )
        for name, held in slots.items()
    ]


def word_of(name: str) -> ChangeWord:
    return "add" if BUNDLES[name][0][1] is None else "swap"


def replay(history: list[Decision]) -> Head | None:
    """The head to which the decisions lead, the oldest first."""
    head: Head | None = None
    for decision in history:
        if decision.what == "first":
            assert head is None
            head = Head(decision.epoch)
        elif decision.what in ("swap", "add", "remove"):
            assert head is not None and decision.previous_epoch == head.current
            head = head.move_to(decision.epoch)
        elif decision.what == "canary":
            assert head is not None and decision.previous_epoch == head.current
            head = head.begin_trial(Trial(decision.epoch, 0.5, 0.1))
        elif decision.what == "promote":
            assert head is not None and head.canary is not None and head.canary.epoch == decision.epoch
            head = head.promote()
        elif decision.what == "rollback":
            assert head is not None
            head = head.end_trial() if head.canary else head.move_to(decision.epoch)
            assert head.current == decision.epoch
        else:
            assert decision.what in ("refused", "forget")
    return head


class RolloutMachine(RuleBasedStateMachine):
    made: ClassVar[dict[str, Bundle]] = {}

    @initialize(room=st.sampled_from([5, 6, 30]))
    def start(self, room: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.world = World(self.folder, BASE, workers(room))
        self.world.pass_time(6.0)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
            shutil.rmtree(self.folder)

    @property
    def added(self) -> list[str]:
        """The bundles of the current epoch that brought slots."""
        current = self.world.plane.epochs.current
        bundles = current.bundles if current else ()
        return [one.name for one in bundles if any(slot > 2 for _, slot in one.experts)]

    def order(self, order: ChangeOrder) -> None:
        """What is refused is refused; what is begun goes on by itself."""
        with suppress(MoesaicError):
            self.world.begin(order)

    def upload(self, name: str) -> None:
        try:
            self.world.upload(self.made[name])
        except Crash:
            self.world.pass_time(0.0)

    @rule(name=NAMES)
    def uploads(self, name: str) -> None:
        self.upload(name)

    @rule(
        name=NAMES,
        operator=OPERATORS,
        canary=st.sampled_from([False, False, True]),
        seconds=st.sampled_from([0.0, 0.3, 2.0]),
    )
    def swaps_or_adds(self, name: str, operator: str, canary: bool, seconds: float) -> None:
        self.changes(name, operator, canary, seconds)

    def changes(self, name: str, operator: str, canary: bool, seconds: float) -> None:
        self.upload(name)
        shares = Shares(0.5, 0.1) if canary else None
        self.order(ChangeOrder(word_of(name), self.made[name].digest, canary=shares, operator=operator))
        self.world.pass_time(seconds)

    @precondition(lambda self: self.added)
    @rule(data=st.data(), seconds=st.sampled_from([0.0, 2.0]))
    def removes(self, data: st.DataObject, seconds: float) -> None:
        self.order(ChangeOrder("remove", name=data.draw(st.sampled_from(self.added))))
        self.world.pass_time(seconds)

    @precondition(lambda self: self.world.plane.epochs.canary)
    @rule(seconds=st.sampled_from([0.0, 2.0]))
    def promotes(self, seconds: float) -> None:
        self.order(ChangeOrder("promote"))
        self.world.pass_time(seconds)

    @precondition(lambda self: self.world.plane.epochs.canary)
    @rule(seconds=st.sampled_from([0.0, 2.0]))
    def gives_the_canary_up(self, seconds: float) -> None:
        self.order(ChangeOrder("rollback"))
        self.world.pass_time(seconds)

    @rule(data=st.data(), seconds=st.sampled_from([0.0, 2.0]))
    def rolls_back(self, data: st.DataObject, seconds: float) -> None:
        known = sorted({one.epoch for one in self.world.plane.store.history(1000) if one.epoch})
        self.order(ChangeOrder("rollback", epoch=data.draw(st.sampled_from(["", *known]))))
        self.world.pass_time(seconds)

    @rule(name=NAMES, step=st.sampled_from([None, None, *forgetting.FAILPOINTS]))
    def forgets(self, name: str, step: str | None) -> None:
        self.world.armed = step
        try:
            self.world.forget(self.made[name])
        except MoesaicError:
            self.world.armed = None
        except Crash:
            self.world.pass_time(0.0)

    @rule(one=NAMES, other=NAMES)
    def two_operators_at_once(self, one: str, other: str) -> None:
        self.upload(one)
        self.upload(other)
        orders = [ChangeOrder(word_of(name), self.made[name].digest) for name in (one, other)]
        with suppress(MoesaicError):
            self.world.begin(orders[0])
            if self.world.plane.changes.is_busy:
                with pytest.raises(Aborted):
                    self.world.begin(orders[1])
        self.world.pass_time(1.0)

    @rule(step=st.sampled_from(FAILPOINTS), name=NAMES, canary=st.booleans())
    def the_controller_crashes_during_a_change(self, step: str, name: str, canary: bool) -> None:
        self.world.armed = step
        self.changes(name, "ann", canary, 4.0)

    @rule()
    def the_controller_is_killed(self) -> None:
        self.world.stop()
        self.world.start()
        self.world.pass_time(0.5)

    @rule(name=st.sampled_from(["w0", "w1", "w2"]))
    def a_worker_dies(self, name: str) -> None:
        self.world.workers[name].die()
        self.world.pass_time(0.5)

    @rule(name=st.sampled_from(["w0", "w1", "w2"]))
    def a_worker_is_started_again(self, name: str) -> None:
        self.world.workers[name].start()
        self.world.pass_time(0.5)

    @rule(router=st.sampled_from([0, 1]), data=st.data())
    def a_sequence_begins(self, router: int, data: st.DataObject) -> None:
        played = self.world.routers[router]
        if played.in_use:
            played.pinned.append(data.draw(st.sampled_from(sorted(played.in_use))))

    @rule(router=st.sampled_from([0, 1]))
    def sequences_end(self, router: int) -> None:
        self.world.routers[router].pinned.clear()
        self.world.pass_time(1.0)

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule()
    def everything_comes_to_rest(self) -> None:
        """With every worker there, workers hold what is in use and nothing else, and routers know it."""
        self.world.armed = None
        for worker in self.world.workers.values():
            if not worker.alive:
                worker.start()
        self.world.pass_time(45.0)
        plane = self.world.plane
        needed = frozenset[ExpertVersion]().union(*(epoch.expert_versions for epoch in plane.epochs.living()))
        held = set().union(*(worker.held for worker in self.world.workers.values()))
        assert held == needed
        assert not plane.changes.is_busy
        for router in self.world.routers:
            assert router.told is not None and plane.epochs.head is not None
            assert router.in_use == set(plane.epochs.head.in_use)

    @invariant()
    def there_is_one_valid_epoch_and_the_history_leads_to_it(self) -> None:
        if not hasattr(self, "world"):
            return
        store = self.world.plane.store
        head = store.head
        assert replay(store.history(10_000)[::-1]) == head
        if head is not None:
            for epoch in filter(None, (*head.in_use, head.previous)):
                kept = store.epoch(epoch)
                assert kept.base == BASE.fingerprint
                assert all(self.world.plane.bundles.has(bundle.digest) for bundle in kept.bundles)


@pytest.mark.timeout(900)  # it computes all the time: half a minute of a whole core
def test_there_is_no_third_state() -> None:
    run_state_machine_as_test(
        RolloutMachine,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="MOESAIC_ROLLOUT_RUNS" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
