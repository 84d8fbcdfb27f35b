"""Which epoch computes a new request, and how long the others are held."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import pytest

from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion, GateRow
from moesaic.errors import FailedPrecondition, Unavailable
from moesaic.expert_policy import ExpertPolicy
from moesaic.routing_table import Canary, RoutingTable, Snapshot
from router.control.epochs import ADOPT_AFTER_S, EpochBook
from router.gating.policy import LayerShape
from router.gating.sides import point_of

TABLE = RoutingTable(1, ())


def epoch_of(version: int, **content: GateRow) -> Epoch:
    versions = {ExpertAddress(0, slot): bytes([version, slot]) * 16 for slot in range(2)}
    return Epoch.of("tiny", versions, **content)


FIRST, SECOND, THIRD = (epoch_of(version) for version in range(3))


@dataclass
class Rig:
    """A book, a clock of the test, which epochs lack replicas, and which have open sequences."""

    now_s: float = 0.0
    lacking: set[str] = field(default_factory=set)
    open: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.book = EpochBook({0: LayerShape(2, 1)}, 4, clock=lambda: self.now_s)

    def missing(self, epoch: Epoch) -> Collection[ExpertVersion]:
        return epoch.expert_versions if epoch.id in self.lacking else ()

    def settle(self) -> list[str]:
        return self.book.settle(self.missing, self.open)

    def take(
        self, epoch: Epoch | None, canary: Canary | None = None, drain_s: float | None = None
    ) -> list[str]:
        self.book.update(Snapshot(epoch, TABLE, canary, drain_s))
        return self.settle()

    def epoch_of(self, request_id: str = "r", session_id: str = "", epoch: str = "") -> str:
        return self.book.choose(request_id, session_id, epoch, None).epoch.id

    @property
    def held(self) -> list[str]:
        return [epoch.id for epoch in self.book.held]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_before_the_first_epoch_every_request_is_to_come_back(rig: Rig) -> None:
    rig.take(None)
    with pytest.raises(Unavailable) as refused:
        rig.epoch_of()
    assert refused.value.retry_after_s


def test_the_first_epoch_is_used_at_once_and_the_next_as_soon_as_replicas_hold_it(rig: Rig) -> None:
    rig.lacking = {FIRST.id, SECOND.id}
    rig.take(FIRST)
    assert rig.epoch_of() == FIRST.id
    rig.take(SECOND)
    assert rig.epoch_of() == FIRST.id
    rig.lacking = set()
    rig.settle()
    assert rig.epoch_of() == SECOND.id


def test_an_epoch_that_stays_incomplete_is_used_in_the_end(rig: Rig) -> None:
    rig.take(FIRST)
    rig.lacking = {SECOND.id}
    rig.take(SECOND)
    rig.now_s = ADOPT_AFTER_S - 1
    rig.take(SECOND)
    assert rig.epoch_of() == FIRST.id
    rig.now_s = ADOPT_AFTER_S
    rig.settle()
    assert rig.epoch_of() == SECOND.id


def test_an_epoch_that_the_model_cannot_be_is_not_used(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.take(FIRST)
    rig.take(epoch_of(1, gate_rows={ExpertAddress(0, 0): GateRow(bytes(4))}))  # type: ignore[arg-type]
    rig.settle()
    assert rig.epoch_of() == FIRST.id
    assert [record.message for record in caplog.records].count("an epoch cannot be served here") == 1
    rig.take(SECOND)
    assert rig.epoch_of() == SECOND.id


def test_a_retired_epoch_is_held_for_its_sequences_and_for_requests_that_name_it(rig: Rig) -> None:
    rig.take(FIRST)
    rig.open = {FIRST.id: 1}
    rig.take(SECOND)
    assert rig.held == [SECOND.id, FIRST.id] and rig.epoch_of(epoch=FIRST.id) == FIRST.id
    rig.open = {}
    rig.settle()
    assert rig.held == [SECOND.id]
    with pytest.raises(FailedPrecondition) as refused:
        rig.epoch_of(epoch=FIRST.id)
    assert refused.value.field == "epoch"


def test_a_policy_is_resolved_in_the_epoch_that_was_chosen(rig: Rig) -> None:
    rig.take(FIRST)
    rig.open = {FIRST.id: 1}
    rig.take(SECOND)
    view = rig.book.choose("r", "", FIRST.id, ExpertPolicy(deny=("0:1",)))
    assert view.epoch is FIRST and view.gates[0].slots == (0,)


def test_sequences_that_outlive_the_drain_are_named_until_they_have_ended(rig: Rig) -> None:
    rig.take(FIRST, drain_s=10.0)
    rig.open = {FIRST.id: 2, SECOND.id: 1}
    rig.now_s = 100.0
    assert rig.take(SECOND, drain_s=10.0) == []
    rig.now_s = 109.0
    assert rig.settle() == []
    rig.now_s = 110.0
    assert rig.settle() == rig.settle() == [FIRST.id]
    rig.open = {SECOND.id: 1}
    assert rig.settle() == [] and rig.held == [SECOND.id]


def test_without_a_drain_time_sequences_have_all_the_time_they_need(rig: Rig) -> None:
    rig.take(FIRST)
    rig.open = {FIRST.id: 1}
    rig.take(SECOND)
    rig.now_s = 1e6
    assert rig.settle() == [] and FIRST.id in rig.held


def test_a_canary_gets_its_share_by_hash_and_a_session_stays_on_its_side(rig: Rig) -> None:
    rig.take(FIRST, Canary(SECOND, 0.3))
    chosen = {f"request-{n}": rig.epoch_of(f"request-{n}") for n in range(1000)}
    on_trial = [request for request, epoch in chosen.items() if epoch == SECOND.id]
    assert 250 < len(on_trial) < 350
    assert all(point_of(request) < 0.3 for request in on_trial)
    assert len({rig.epoch_of(f"request-{n}", session_id="one") for n in range(50)}) == 1
    assert chosen == {f"request-{n}": rig.epoch_of(f"request-{n}") for n in range(1000)}
    # A larger share keeps those that are on trial there.
    rig.take(FIRST, Canary(SECOND, 0.6))
    assert all(rig.epoch_of(request) == SECOND.id for request in on_trial)


@pytest.mark.parametrize(("share", "expected"), [(0.0, FIRST.id), (1.0, SECOND.id)])
def test_a_share_of_nothing_is_nobody_and_of_one_everybody(rig: Rig, share: float, expected: str) -> None:
    rig.take(FIRST, Canary(SECOND, share))
    assert {rig.epoch_of(f"request-{n}") for n in range(100)} == {expected}
    assert rig.epoch_of(epoch=FIRST.id) == FIRST.id and rig.epoch_of(epoch=SECOND.id) == SECOND.id


def test_a_canary_begins_once_replicas_hold_it_and_its_end_is_that_of_its_requests(rig: Rig) -> None:
    rig.take(FIRST)
    rig.lacking = {SECOND.id}
    rig.take(FIRST, Canary(SECOND, 1.0))
    assert rig.epoch_of() == FIRST.id and rig.book.canary is None
    rig.lacking = set()
    rig.settle()
    assert rig.epoch_of() == SECOND.id
    rig.open = {SECOND.id: 1}
    rig.take(FIRST)
    assert rig.epoch_of() == FIRST.id and rig.held == [FIRST.id, SECOND.id]


def test_a_promoted_canary_is_the_current_epoch_and_the_one_before_is_retired(rig: Rig) -> None:
    rig.take(FIRST, Canary(SECOND, 0.5))
    view = rig.book.choose("r", "", SECOND.id, None)
    rig.open = {FIRST.id: 1}
    rig.take(SECOND)
    assert rig.book.current == SECOND and rig.book.canary is None and rig.held == [SECOND.id, FIRST.id]
    assert rig.book.choose("r", "", "", None) is view
    rig.take(SECOND, Canary(THIRD, 0.5))
    assert set(rig.held) == {SECOND.id, THIRD.id, FIRST.id}


def test_a_rollback_takes_the_epoch_back_that_is_still_held(rig: Rig) -> None:
    rig.take(FIRST)
    view = rig.book.choose("r", "", "", None)
    rig.open = {FIRST.id: 1, SECOND.id: 1}
    rig.take(SECOND)
    rig.take(FIRST)
    assert rig.book.choose("r", "", "", None) is view and rig.held == [FIRST.id, SECOND.id]


def test_what_is_shadowed_is_the_current_epoch_by_the_canary(rig: Rig) -> None:
    rig.take(FIRST, Canary(SECOND, 0.1))
    assert rig.book.shadow is None
    rig.take(FIRST, Canary(SECOND, 0.1, 0.5))
    shadow = rig.book.shadow
    assert shadow is not None
    assert (shadow.epoch, shadow.view.epoch, shadow.share) == (FIRST.id, SECOND, 0.5)


def test_points_are_spread_and_differ_between_purposes() -> None:
    points = [point_of(str(n)) for n in range(2000)]
    assert all(0 <= point < 1 for point in points)
    assert abs(sum(points) / len(points) - 0.5) < 0.03
    assert points != [point_of(str(n), b"shadow") for n in range(2000)]
