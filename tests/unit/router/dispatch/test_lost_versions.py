"""Which expert versions count as lost: those without a replica, and for a moment those that nobody has computed."""

from __future__ import annotations

from dataclasses import dataclass

from support.fake_links import digest, make_epoch, make_pool
from support.views import plain_view

from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import DataLoss, DeadlineExceeded, Overloaded, Unavailable
from moesaic.routing_table import RoutingTable
from router.dispatch.lost_versions import LOST_S, LostVersions, is_mendable


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


EPOCH = make_epoch(2, 4)
VIEW = plain_view(EPOCH)
ONE = ExpertVersion(ExpertAddress(1, 2), digest(1, 2))


def test_nothing_is_lost_while_all_have_replicas() -> None:
    pool, _ = make_pool(EPOCH, {"a": range(4)})
    assert LostVersions(pool).slots_of(VIEW) == {}


def test_a_version_without_a_replica_is_lost_until_it_has_one() -> None:
    pool, links = make_pool(EPOCH, {"a": range(2), "b": range(2, 4)})
    lost = LostVersions(pool)
    replicas = tuple(link.replica for link in links.values())
    links["b"].is_lost = True
    pool.update(RoutingTable(2, replicas[:1]))
    assert lost.slots_of(VIEW) == {0: {2, 3}, 1: {2, 3}}
    pool.update(RoutingTable(3, replicas))
    assert lost.slots_of(VIEW) == {}


def test_a_version_that_nobody_has_computed_is_lost_for_a_moment() -> None:
    pool, _ = make_pool(EPOCH, {"a": range(4)})
    lost = LostVersions(pool, clock=(clock := Clock()))
    lost.note(ONE)
    assert lost.slots_of(VIEW) == {1: {2}} and lost.num_noted == 1
    lost.note(ONE)
    assert lost.num_noted == 1
    clock.now_s += 1.1 * LOST_S
    assert lost.slots_of(VIEW) == {}
    lost.note(ONE)
    assert lost.num_noted == 2


def test_a_change_of_the_replicas_gives_it_another_try() -> None:
    pool, links = make_pool(EPOCH, {"a": range(4)})
    lost = LostVersions(pool)
    lost.note(ONE)
    pool.update(RoutingTable(2, (links["a"].replica,)))
    assert lost.slots_of(VIEW) == {}


def test_another_version_of_the_slot_is_not_lost_with_it() -> None:
    pool, _ = make_pool(EPOCH, {"a": range(4)})
    lost = LostVersions(pool)
    lost.note(ExpertVersion(ONE.address, digest(0, 0)))
    assert lost.slots_of(VIEW) == {}


def test_only_what_another_try_can_mend_is_waited_for() -> None:
    mendable = [
        Unavailable("m", reason="NO_REPLICA"),
        Unavailable("m", reason="EXPERT_FAILED"),
        DeadlineExceeded("m", reason="EXPERT_SILENT"),
    ]
    others = [Overloaded("m"), DataLoss("m"), Unavailable("m", reason="NOT_FINITE"), DeadlineExceeded("m")]
    assert all(map(is_mendable, mendable)) and not any(map(is_mendable, others))
