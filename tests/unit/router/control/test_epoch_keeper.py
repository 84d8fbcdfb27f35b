"""What the engine is told of epochs, and what is reported of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from moesaic.epoch import Epoch, ExpertAddress
from moesaic.errors import DataLoss, Unavailable
from moesaic.routing_table import Canary, RoutingTable, Snapshot
from router.control.epoch_keeper import EpochKeeper
from router.control.epoch_reports import RouterIdentity, report_of
from router.control.epochs import EpochBook
from router.dispatch.shadow import Shadow
from router.engine.epoch_tally import EpochTally
from router.gating.policy import LayerShape

FIRST, SECOND = (
    Epoch.of("tiny", {ExpertAddress(0, slot): bytes([version, slot]) * 16 for slot in range(2)})
    for version in range(2)
)
TABLE = RoutingTable(1, ())


@dataclass
class FakeEngine:
    open: dict[str, int] = field(default_factory=dict)
    retired: list[str] = field(default_factory=list)
    shadow: Shadow | None = None

    def open_sequences(self) -> Mapping[str, int]:
        return self.open

    def retire(self, epoch: str) -> None:
        self.retired.append(epoch)

    def set_shadow(self, shadow: Shadow | None) -> None:
        self.shadow = shadow


def make_keeper() -> tuple[EpochKeeper, FakeEngine, list[float]]:
    now_s, engine = [0.0], FakeEngine()
    book = EpochBook({0: LayerShape(2, 1)}, 4, clock=lambda: now_s[0])
    return EpochKeeper(book, engine, lambda epoch: ()), engine, now_s


async def test_whoever_waits_for_the_first_epoch_gets_it() -> None:
    keeper, _, _ = make_keeper()
    waiting = asyncio.create_task(keeper.wait_first())
    keeper.take(Snapshot(None, TABLE))
    await asyncio.sleep(0)
    assert not waiting.done()
    keeper.take(Snapshot(FIRST, TABLE))
    assert await waiting == FIRST


async def test_overdue_sequences_end_and_shadows_come_and_go() -> None:
    keeper, engine, now_s = make_keeper()
    keeper.take(Snapshot(FIRST, TABLE, Canary(SECOND, 0.5, 0.25)))
    assert engine.shadow is not None and engine.shadow.view.epoch == SECOND
    engine.open = {FIRST.id: 1}
    keeper.take(Snapshot(SECOND, TABLE, drain_s=3.0))
    assert engine.shadow is None and not engine.retired
    now_s[0] = 3.0
    keeper.settle()
    assert engine.retired == [FIRST.id]


async def test_every_change_is_one_to_report_and_nothing_else_is() -> None:
    keeper, engine, _ = make_keeper()
    engine.open = {FIRST.id: 1}
    for snapshot, changes in (
        (Snapshot(FIRST, TABLE), True),
        (Snapshot(FIRST, TABLE), False),
        (Snapshot(FIRST, TABLE, Canary(SECOND, 0.5)), True),
        (Snapshot(SECOND, TABLE), True),
    ):
        keeper.take(snapshot)
        assert keeper.changed.is_set() == changes
        keeper.changed.clear()
    engine.open = {}
    keeper.settle()
    assert keeper.changed.is_set()


def test_a_report_has_the_figures_of_every_epoch_that_is_held() -> None:
    keeper, _, _ = make_keeper()
    keeper.take(Snapshot(FIRST, TABLE, Canary(SECOND, 0.5)))
    tally = EpochTally(finished=3)
    tally.note_failure(Unavailable("gone"))
    tally.note_failure(DataLoss("nan", reason="NOT_FINITE"))
    tally.token_s.extend([0.01] * 98 + [0.5] * 2)
    tally.first_token_s.append(0.2)
    report = report_of(
        RouterIdentity("router-0", "abc", "host:1"),
        keeper.book,
        revision=7,
        open_sequences={SECOND.id: 2},
        tallies={SECOND.id: tally, "forgotten": EpochTally()},
    )
    assert (report.router, report.incarnation, report.address) == ("router-0", "abc", "host:1")
    assert (report.epoch, report.canary, report.routing_table_revision) == (FIRST.id, SECOND.id, 7)
    current, canary = report.epochs
    assert (current.epoch, current.open_sequences, current.finished) == (FIRST.id, 0, 0)
    assert (canary.open_sequences, canary.finished, canary.failed, canary.not_finite) == (2, 3, 2, 1)
    assert (canary.token_p50_s, canary.token_p99_s, canary.first_token_p50_s) == (0.01, 0.5, 0.2)
