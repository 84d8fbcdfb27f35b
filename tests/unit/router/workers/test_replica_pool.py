"""Which replica a call goes to, as routing tables come and replicas fail."""

from __future__ import annotations

import logging

import pytest
from support.fake_links import FakeLink, digest, make_epoch

from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import DataLoss, MoesaicError, Overloaded, Unavailable
from moesaic.routing_table import Replica, RoutingTable
from router.workers import replica_pool
from router.workers.replica_pool import (
    BACK_OFF_S,
    MAX_UNLISTED,
    SHARE_ROWS,
    SILENT_BACK_OFF_S,
    WELL_AFTER_S,
    ReplicaPool,
)
from router.workers.transports.base import HOST_SILENT

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

    def fail(self, incarnation: str, error: MoesaicError = GONE) -> None:
        self.pool.note_failure(self.links[incarnation], error)


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


def test_a_replica_that_failed_is_left_alone_for_a_moment(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.fail("a1")
    assert [rig.pick() for _ in range(4)] == ["b1"] * 4
    rig.now_s += BACK_OFF_S + 0.1
    assert rig.pick() == "a1"


def test_a_replica_whose_host_is_silent_is_left_alone_for_longer(rig: Rig) -> None:
    rig.publish(1, "a1", "b1")
    rig.fail("a1", Unavailable("silent", reason=HOST_SILENT))
    rig.now_s += BACK_OFF_S + 0.1
    assert [rig.pick() for _ in range(4)] == ["b1"] * 4
    rig.now_s += SILENT_BACK_OFF_S
    assert rig.pick() == "a1"


def test_a_model_is_replicated_where_every_version_has_two_holders(rig: Rig) -> None:
    assert not rig.pool.replicated
    rig.publish(1, "a1")
    assert not rig.pool.replicated
    rig.publish(2, "a1", "b1")
    assert rig.pool.replicated


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
                rig.pool.note_answer(rig.links["a1"])
                rig.pool.note_answer(rig.links["b1"])
            (record,) = caplog.records
            assert record.message == "a worker fails"
            assert record.fields == {
                "worker": "a",
                "address": "a:1",
                "reason": "the worker's answer is not finite",
            }
            rig.now_s += WELL_AFTER_S
            rig.pool.note_answer(rig.links["a1"])
            rig.pool.note_answer(rig.links["a1"])
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
