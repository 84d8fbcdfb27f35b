"""What the reports of routers say about spreading and draining."""

from __future__ import annotations

from cluster.control.head import Head, Trial
from cluster.control.router_reports import LATELY_S, RouterReports
from moesaic.v1 import control_pb2


def report(
    router: str, epoch: str, canary: str = "", open_in: tuple[str, ...] = (), revision: int = 1
) -> control_pb2.ReportEpochsRequest:
    return control_pb2.ReportEpochsRequest(
        router=router,
        address=f"{router}:1",
        epoch=epoch,
        canary=canary,
        routing_table_revision=revision,
        epochs=[control_pb2.EpochStats(epoch=one, open_sequences=1) for one in open_in],
    )


def test_a_change_has_spread_once_every_router_that_reports_uses_it() -> None:
    reports, head = RouterReports(), Head("new", "old", Trial("try", 0.1))
    assert reports.spread(head, 0.0) == (0, 0)
    reports.hear(report("r0", "new", "try"), 0.0)
    reports.hear(report("r1", "old"), 0.0)
    assert reports.spread(head, 1.0) == (1, 2)
    reports.hear(report("r1", "new", "try"), 2.0)
    assert reports.spread(head, 2.0) == (2, 2)


def test_a_router_that_was_silent_is_not_waited_for_when_a_change_spreads_but_when_an_epoch_drains() -> None:
    reports = RouterReports()
    reports.hear(report("r0", "new"), 0.0)
    reports.hear(report("r1", "old"), 0.0)
    later_s = LATELY_S + 1
    reports.hear(report("r0", "new", revision=7), later_s)
    assert reports.spread(Head("new"), later_s) == (1, 1)
    assert reports.saw(7, later_s)
    assert not reports.released("old", since_s=0.0)
    reports.forget_before(1.0)
    assert reports.released("old", since_s=0.0)


def test_an_epoch_is_released_by_reports_after_it_was_retired_alone() -> None:
    reports = RouterReports()
    assert not reports.released("old", since_s=0.0)
    reports.hear(report("r0", "new"), 1.0)
    assert not reports.released("old", since_s=1.0)
    reports.hear(report("r0", "new", open_in=("old",)), 2.0)
    assert not reports.released("old", since_s=1.0)
    assert reports.pinned() == {"new", "old"}
    reports.hear(report("r0", "new"), 3.0)
    assert reports.released("old", since_s=1.0)
