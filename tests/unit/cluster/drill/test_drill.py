"""What a drill is asked for is checked before anything is started or harmed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.bench.bench import Outputs
from cluster.cli.commands import app
from cluster.drill import drill
from cluster.drill.answers import Tally
from cluster.drill.contract import Figures
from cluster.drill.drill import drill_own_clusters, drill_running_cluster, make_plan, parse_faults
from cluster.drill.faults import Act, Fault, Injection
from cluster.drill.injector import Strike
from cluster.drill.report import Cancels, Case
from cluster.drill.rig import DrillPlan
from cluster.drill.site import Site
from cluster.drill.timeline import Span, Spread
from cluster.drill.under_load import TAIL_S, Turns
from moesaic.errors import FailedPrecondition, InvalidArgument, Unavailable
from moesaic.settings import Settings

NO_OUTPUTS = Outputs(as_json=True, save=None, chart=None)
PLAN = DrillPlan(60.0, 0, 8)


def case(fault: Fault, **figures: int) -> Case:
    tally = Tally(0, 0, 0, 0, 0, {})
    return Case(
        fault, fault, "4 workers", "m", Figures(**figures), (), cancels=Cancels(0, Spread.of(()), 0, tally)
    )


class Sites:
    """Makes sites without a cluster, and counts them."""

    def __init__(self) -> None:
        self.made: list[Site] = []

    @contextlib.asynccontextmanager
    async def make(self, *, own: bool) -> AsyncIterator[Site]:
        child = type("Running", (), {"has_ended": False})()
        site = Site("http://h:1", "h:2", "m", (child,) if own else ())
        self.made.append(site)
        yield site
        site.left_behind = 2


def test_faults_are_named_alone_or_with_commas_and_once() -> None:
    assert parse_faults(["kill,freeze", "kill"]) == (Fault.KILL, Fault.FREEZE)
    with pytest.raises(InvalidArgument, match="fault: must be one of kill, freeze"):
        parse_faults(["kil"])


@pytest.mark.parametrize("minutes", [0.0, 0.05, 1e6, float("nan")])
def test_a_drill_of_no_time_or_of_weeks_is_refused(minutes: float) -> None:
    with pytest.raises(InvalidArgument, match="minutes"):
        make_plan(minutes, 0, 8)


async def test_a_running_cluster_has_no_worker_to_poison() -> None:
    with pytest.raises(InvalidArgument, match="nan needs a worker that can be poisoned"):
        await drill_running_cluster("http://h:1", "h:2", (Fault.NAN,), PLAN, NO_OUTPUTS)


async def test_a_cluster_of_one_host_has_no_host_to_cut_off() -> None:
    with pytest.raises(FailedPrecondition, match="a cluster of several hosts"):
        await drill_own_clusters(Settings(), (Fault.PARTITION,), PLAN, NO_OUTPUTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fault", "fire"), "--fault"),
        (("--minutes", "0"), "--minutes"),
        (("--grpc", "127.0.0.1:1"), "give its --http too"),
        (("m", "--http", "127.0.0.1:1"), "has its model"),
        (("--http", "nowhere"), "--http"),
    ],
)
def test_bad_input_is_named_as_it_was_typed(arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["drill", *arguments])
    assert result.exit_code == 2
    assert said in result.output


async def test_faults_share_a_cluster_until_one_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, cases = Sites(), []

    async def drilled(fault: Fault, *_: object) -> Case:
        return case(fault, not_recovered=1 if fault is Fault.CONTROLLER else 0)

    monkeypatch.setattr(drill, "_case", drilled)
    faults = (Fault.KILL, Fault.CONTROLLER, Fault.FREEZE)
    await drill._drill_site(lambda: sites.make(own=True), faults, PLAN, lambda _: None, cases)
    assert [each.fault for each in cases] == list(faults)
    assert len(sites.made) == 2
    assert [each.figures.left_behind for each in cases] == [0, 2, 2]
    assert "2 processes left behind" in cases[-1].broken


async def test_what_was_measured_is_delivered_also_when_a_later_fault_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sites = Sites()

    async def drilled(fault: Fault, *_: object) -> Case:
        if fault is Fault.FREEZE:
            raise Unavailable("the cluster is not whole")
        return case(fault)

    async def nobody_else() -> float:
        return 0.0

    monkeypatch.setattr(drill, "_case", drilled)
    monkeypatch.setattr(drill, "share_used_by_others", nobody_else)
    outputs = Outputs(as_json=True, save=tmp_path / "drill.json", chart=None)
    with pytest.raises(Unavailable):
        await drill._drill([(lambda: sites.make(own=False), (Fault.KILL, Fault.FREEZE))], PLAN, outputs)
    assert '"title": "kill"' in (tmp_path / "drill.json").read_text()


def test_a_strike_is_compared_with_as_long_a_window_of_its_control() -> None:
    turns = Turns()
    injection = Injection(5.0, Act.KILL, ("w0",))
    strikes = [Strike(injection, 105.0, 105.0, 108.0), Strike(injection, 118.0, 118.0, None)]
    turns.add(strikes, Span(100.0, 125.0), Span(60.0, 80.0))
    assert turns.windows == [Span(105.0, 108.0 + TAIL_S), Span(118.0, 125.0 + TAIL_S)]
    assert turns.control_windows == [Span(65.0, 68.0 + TAIL_S), Span(72.0, 80.0)]
