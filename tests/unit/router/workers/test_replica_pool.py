"""Which replica a call goes to, as routing tables come and replicas fail."""

from __future__ import annotations

import logging

import pytest
from support.fake_links import FakeLink, digest, make_epoch

from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import DataLoss, MoesaicError, Overloaded, Unavailable
from moesaic.routing_table import Replica, RoutingTable
from router.workers import replica_pool
from router.workers.call_times import REFRESH
from router.workers.circuit import PROBE_PAUSE_S, WRONG_ANSWERS, CircuitState
from router.workers.replica_pool import (
    BUSY_S,
    MAX_UNLISTED,
    SHARE_ROWS,
    WELL_AFTER_S,
    DueProbe,
    ReplicaPool,
)
from router.workers.slowness import HALF_LIFE_S

EPOCH = make_epoch(1, 2)
FIRST = ExpertAddress(0, 0)
GONE = Unavailable("gone")


class Rig:
    """A pool over fake links and a clock that stands still."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.links: dict[str, FakeLink] = {}
        self.pool = ReplicaPool(connect=self._connect, clock=lambda: self.now_s)

    def _connect(self, replica: Replica) -> FakeLink:
        self.links[replica.incarnation] = FakeLink(replica)
        return self.links[replica.incarnation]

    def publish(self, revision: int, *incarnations: str) -> None:
        """A table of workers that hold everything; "a2" is the second start of worker "a", at its address."""
        replicas = (Replica(name[0], f"{name[0]}:1", name, EPOCH.expert_versions) for name in incarnations)
        self.pool.update(RoutingTable(revision, tuple(replicas)))

    def pick(self, *exclude: str, **planned: int) -> str | None:
        rows = {self.links[name]: num_rows for name, num_rows in planned.items()}
        link = self.pool.pick(FIRST, digest(0, 0), exclude=exclude, planned=rows)
        return None if link is None else link.replica.incarnation

    def fail(self, incarnation: str, error: MoesaicError | TimeoutError = GONE) -> None:
        self.pool.note_failure(self.links[incarnation], error)

    def answer(self, incarnation: str, seconds: float = 0.001) -> None:
        self.pool.note_answer(self.links[incarnation], 4, seconds)

    def probes(self) -> dict[str, DueProbe]:
        """Those that are due now, by incarnation."""
        return {probe.link.replica.incarnation: probe for probe in self.pool.due_probes()}

    def circuit(self, incarnation: str) -> CircuitState:
        health = {one.link.replica.incarnation: one for one in self.pool.health()}
        return health[incarnation].circuit


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_new_table_opens_links_and_closes_those_that_are_gone(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.links["a1"].is_lost = True
    rig.publish(2, "b1", "c1")
    assert rig.links["a1"].closed and not rig.links["b1"].closed
    assert [link.replica.worker for link in rig.pool.links] == ["b", "c"]


def test_a_table_without_healthy_workers_loses_nothing(rig: Rig) -> None:
    """What a controller publishes that slept, and takes its own pause for theirs."""
    rig.publish(1, "a1", "b1")
    rig.publish(2)
    assert rig.pool.missing(EPOCH) == [] and {rig.pick(), rig.pick()} == {"a1", "b1"}
    rig.publish(3, "a1", "b1")
    assert len(rig.links) == 2 and not any(link.closed for link in rig.links.values())


def test_a_replica_that_is_not_listed_is_called_where_nobody_else_can_be(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.publish(2, "b1")
    assert [rig.pick() for _ in range(4)] == ["b1"] * 4
    assert rig.pick("b1") == "a1"
    rig.fail("b1")
    assert rig.pick() == "a1"


def test_a_replica_that_is_not_listed_is_gone_with_its_first_failed_call(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.publish(2)
    rig.fail("a1")
    assert rig.links["a1"].closed and rig.pool.links == (rig.links["b1"],)
    rig.fail("a1")
    rig.fail("b1", Overloaded("full"))
    assert rig.pick() == "b1" and rig.pool.missing(EPOCH) == []
    rig.fail("b1")
    assert rig.pick() is None and len(rig.pool.missing(EPOCH)) == 2


def test_a_replica_that_is_listed_outlives_a_failed_call(rig: Rig) -> None:
    rig.publish(1, "a1")
    rig.fail("a1")
    rig.links["a1"].is_lost = True
    rig.pool.prune()
    assert rig.pick() == "a1" and not rig.links["a1"].closed


def test_a_replica_that_is_not_listed_is_gone_when_its_connection_breaks(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.publish(2)
    rig.links["a1"].is_lost = True
    rig.pool.prune()
    assert rig.links["a1"].closed and not rig.links["b1"].closed
    assert rig.pool.links == (rig.links["b1"],)


def test_so_many_replicas_that_are_not_listed_are_kept_and_no_more(rig: Rig) -> None:
    for revision in range(MAX_UNLISTED + 10):
        replica = Replica("a", f"a:{revision}", f"a{revision}", EPOCH.expert_versions)
        rig.pool.update(RoutingTable(revision, (replica,)))
    assert len(rig.pool.links) == MAX_UNLISTED + 1
    assert [name for name, link in rig.links.items() if link.closed] == [f"a{n}" for n in range(9)]


def test_a_restarted_worker_is_another_replica(rig: Rig) -> None:
    rig.publish(1, "a1")
    rig.publish(2, "a2")
    assert rig.links["a1"].closed and rig.pick() == "a2"


def test_a_version_that_a_running_worker_loads_becomes_visible_on_the_same_link(rig: Rig) -> None:
    first, second = (ExpertVersion(FIRST, digest(0, 0)), ExpertVersion(FIRST, b"2" * 32))
    for revision, holdings in enumerate([{first}, {first, second}, {second}]):
        replica = Replica("a", "a:1", "a1", frozenset(holdings))
        rig.pool.update(RoutingTable(revision, (replica,)))
        for version in (first, second):
            link = rig.pool.pick(*version)
            assert link is (rig.links["a1"] if version in holdings else None)
    assert len(rig.links) == 1 and not rig.links["a1"].closed


def test_an_older_table_changes_nothing(rig: Rig) -> None:
    rig.publish(2, "a1")
    rig.publish(1, "b1")
    assert rig.pick() == "a1"


def test_a_replica_that_failed_is_left_alone_until_it_has_answered_a_probe(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.fail("a1")
    rig.now_s += 60.0
    assert [rig.pick() for _ in range(4)] == ["b1"] * 4
    rig.pool.note_probe(rig.probes()["a1"], None)
    assert {rig.pick(), rig.pick()} == {"a1", "b1"}


def test_a_replica_that_is_overloaded_is_left_alone_for_a_moment(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.fail("a1", Overloaded("full"))
    assert [rig.pick() for _ in range(4)] == ["b1"] * 4
    rig.now_s += BUSY_S + 0.1
    assert rig.pick() == "a1"


def test_an_open_circuit_gets_no_call_even_where_there_is_no_other_replica(rig: Rig) -> None:
    rig.publish(1, "a1")
    rig.fail("a1", TimeoutError())
    assert rig.circuit("a1") is CircuitState.OPEN and rig.pick() is None
    rig.now_s += PROBE_PAUSE_S
    probe = rig.probes()["a1"]
    assert rig.circuit("a1") is CircuitState.HALF_OPEN and not rig.probes() and rig.pick() is None
    rig.pool.note_probe(probe, None)
    assert rig.pick() == "a1"


def test_a_replica_that_was_late_is_not_called_while_another_one_can_be(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.pool.note_late(rig.links["a1"], 4, 0.5)
    assert [rig.pick() for _ in range(4)] == ["b1"] * 4 and rig.pick("b1") == "a1"
    assert rig.links["a1"].traffic.hedged_calls == 1
    rig.pool.note_probe(rig.probes()["a1"], TimeoutError())
    assert rig.circuit("a1") is CircuitState.OPEN and rig.pick("b1") is None


def test_a_slow_replica_gets_few_calls_and_is_measured_again_now_and_then(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    asked = {"a1": 0, "b1": 0}
    for _ in range(10_000):
        chosen = rig.pick()
        assert chosen is not None
        asked[chosen] += 1
        seconds = 0.02 if chosen == "a1" else 0.002
        rig.now_s += seconds
        rig.answer(chosen, seconds)
    assert 5 < asked["a1"] < 0.02 * asked["b1"]


def test_a_slow_replica_takes_work_when_the_others_have_more_than_enough(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    for _ in range(10 * REFRESH):
        rig.answer("b1", 0.001)
    for _ in range(20):
        rig.answer("a1", 0.004)
    rig.links["b1"].in_flight = 2
    assert rig.pick() == "b1"
    rig.links["b1"].in_flight = 6
    assert rig.pick() == "a1"
    rig.links["b1"].in_flight = 0
    rig.now_s += 4 * HALF_LIFE_S
    assert {rig.pick(), rig.pick()} == {"a1", "b1"}


def test_wrong_answers_put_a_replica_into_quarantine_and_the_operator_is_told_why(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.publish(1, "a1", "b1")
    version = ExpertVersion(FIRST, digest(0, 0))
    for _ in range(WRONG_ANSWERS):
        rig.pool.note_wrong(rig.links["a1"], "the worker computed with another version", version)
    assert rig.circuit("a1") is CircuitState.QUARANTINED and rig.pick("b1") is None
    assert caplog.records[-1].message == "a worker is not called any more: its answers are wrong"
    assert caplog.records[-1].fields["reason"] == "the worker computed with another version"
    rig.answer("a1")
    assert rig.pick("b1") is None, "answers of calls that were sent before end no quarantine"
    (first, _) = rig.pool.health()
    assert first.last_error == "the worker computed with another version"


def test_a_replica_in_quarantine_is_probed_with_the_version_that_it_got_wrong(rig: Rig) -> None:
    rig.publish(1, "a1")
    for address_slot in (0, 1):
        version = ExpertVersion(ExpertAddress(0, address_slot), digest(0, address_slot))
        for _ in range(WRONG_ANSWERS):
            rig.pool.note_wrong(rig.links["a1"], "wrong", version)
    rig.now_s += 60.0
    probe = rig.probes()["a1"]
    assert probe.is_blamed and probe.version.address.slot == 1
    rig.pool.note_probe(probe, DataLoss("wrong"))
    assert not rig.probes()
    rig.now_s += 120.0
    rig.pool.note_probe(rig.probes()["a1"], None)
    assert rig.pick() == "a1"


def test_replicas_without_traffic_are_probed_and_busy_ones_are_not(rig: Rig) -> None:
    rig.publish(1, "a1", "b1", "c1")
    assert not rig.probes()
    rig.now_s += 1.5
    rig.answer("a1")
    rig.links["b1"].in_flight = 1
    assert set(rig.probes()) == {"c1"}


def test_a_version_has_another_holder_where_two_workers_hold_it(rig: Rig) -> None:
    first, second = sorted(EPOCH.expert_versions, key=lambda version: version.address)[:2]
    assert not rig.pool.have_another_holder([first])
    rig.publish(1, "a1")
    assert not rig.pool.have_another_holder([first])
    rig.publish(2, "a1", "b1")
    assert rig.pool.have_another_holder([first, second])
    part = frozenset({first})
    rig.pool.update(
        RoutingTable(3, (Replica("a", "a:1", "a1", EPOCH.expert_versions), Replica("b", "b:1", "b1", part)))
    )
    assert rig.pool.have_another_holder([first])
    assert not rig.pool.have_another_holder([first, second])


def test_a_replica_that_failed_is_asked_when_there_is_no_other(rig: Rig) -> None:
    rig.publish(1, "a1")
    rig.fail("a1")
    assert rig.pick() == "a1"


def test_equal_replicas_are_asked_in_turn(rig: Rig) -> None:
    rig.publish(1, "a1", "b1", "c1")
    assert [rig.pick() for _ in range(6)] == ["a1", "b1", "c1"] * 2
    assert [rig.pick("b1") for _ in range(4)] == ["a1", "c1"] * 2


def test_the_replica_with_the_fewest_calls_in_flight_comes_first(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.links["a1"].in_flight = 1
    assert [rig.pick() for _ in range(3)] == ["b1"] * 3


def test_a_wave_stays_with_one_replica_until_its_rows_are_worth_another_message(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    assert rig.pick() == "a1"
    assert rig.pick(a1=1) == rig.pick(a1=SHARE_ROWS - 1) == "a1"
    assert rig.pick(a1=SHARE_ROWS) == "b1"
    assert rig.pick(a1=SHARE_ROWS, b1=SHARE_ROWS - 1) == "b1"


def test_a_failing_worker_is_logged_once_and_once_more_when_it_has_answered_for_a_while(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.publish(1, "a1", "b1")
    with caplog.at_level(logging.INFO, replica_pool.__name__):
        for _ in range(2):
            caplog.clear()
            for _ in range(50):
                rig.fail("a1", DataLoss("the worker's answer is not finite"))
                rig.now_s += 0.5
                rig.answer("a1")
                rig.answer("b1")
            (record,) = caplog.records
            assert record.message == "a worker fails"
            assert record.fields == {
                "worker": "a",
                "address": "a:1",
                "reason": "the worker's answer is not finite",
            }
            rig.now_s += WELL_AFTER_S
            rig.answer("a1")
            rig.answer("a1")
            assert [record.message for record in caplog.records[1:]] == ["a worker answers again"]


def test_an_excluded_worker_is_never_picked(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    assert rig.pick("a1") == "b1"
    assert rig.pick("a1", "b1") is None


def test_two_workers_of_one_name_do_not_exclude_each_other(rig: Rig) -> None:
    rig.publish(1, "a1", "a2")
    assert rig.pick("a1") == "a2"
    assert rig.pick("a2") == "a1"


def test_another_version_of_an_expert_is_not_a_replica_of_it(rig: Rig) -> None:
    rig.publish(1, "a1")
    assert rig.pool.pick(FIRST, b"other" * 6 + b"..") is None


def test_what_nobody_holds_is_missing(rig: Rig) -> None:
    assert len(rig.pool.missing(EPOCH)) == 2
    rig.publish(1, "a1")
    assert rig.pool.missing(EPOCH) == []
