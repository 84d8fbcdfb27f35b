"""What a drill prints and draws."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from cluster.bench.machine import Machine
from cluster.drill.answers import Tally
from cluster.drill.chart import draw_chart
from cluster.drill.contract import Figures
from cluster.drill.experts import Outcome
from cluster.drill.faults import Fault
from cluster.drill.report import (
    Cancels,
    Case,
    DrillReport,
    Mark,
    Overload,
    Picture,
    UnderLoad,
    print_report,
)
from cluster.drill.residue import Residue, measure
from cluster.drill.timeline import Spread

TALLY = Tally(10, 1, 0, 0, 2, {"HTTP 503: [router] away": 1})
SPREAD = Spread(0.1, 0.2, 0.3)
LOADED = UnderLoad(
    faults=4,
    tally=TALLY,
    control=TALLY,
    pauses=SPREAD,
    control_pauses=SPREAD,
    token_gaps=SPREAD,
    control_token_gaps=SPREAD,
    tokens_per_s=90.0,
    control_tokens_per_s=100.0,
    recovery=SPREAD,
    poisoned_calls=3,
    lateness=SPREAD,
    control_lateness=SPREAD,
    picture=Picture(0.5, (1.0, 2.0, 0.0), ((0.5, 1.5),), (Mark("kill w0", 0.6, 0.6, None),)),
)
LOST = Case("kill", Fault.KILL, "4 workers", "m", Figures(lost=1), ("1 requests lost",), under_load=LOADED)
CANCELS = Case(
    "cancel",
    Fault.CANCEL,
    "4 workers",
    "m",
    Figures(),
    (),
    cancels=Cancels(100, SPREAD, 0, replace(TALLY, errors={})),
)
OVERLOAD = Case(
    "overload",
    Fault.OVERLOAD,
    "4 workers",
    "m",
    Figures(),
    (),
    notes=("the server ended by itself: [1]",),
    overload=Overload(4.0, 20.0, 400.0, 380.0, 50, 0, SPREAD, SPREAD, TALLY),
    before=Residue(2, 1 << 20, 1 << 10, 8, 4),
    after=Residue(2, 1 << 21, 1 << 10, 8, 5),
    changes={Outcome.COMMITTED: 3, Outcome.LEFT: 1},
)
REPORT = DrillReport(7, 2.0, 8, Machine("cpu", 2, 1, "3.11", {}), 0.0, (LOST, CANCELS, OVERLOAD))


def printed(report: DrillReport) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=200))
    return out.getvalue()


def test_a_report_names_what_is_broken_and_every_kind_of_figure() -> None:
    text = printed(REPORT)
    for part in (
        "broken: 1 requests lost",
        "1 x HTTP 503: [router] away",
        "2 refusals with Retry-After, whose clients came back",
        "between two tokens of a stream p99 200 ms, in the control 200 ms",
        "the drill itself was late, p99 0.20 s",
        "3 calls in all",
        "work stopped p50 0.10 s",
        "20.0 requests a second offered",
        "goodput 380 of 400 tokens/s, 0.95 of the peak; 50 refused, p50 100 ms, p99 200 ms",
        "the server ended by itself: [1]",
        "1.0 MiB and 2.0 MiB resident",
        "4 changes of experts with a fault in their middle: 3 were committed, 1 left the old epoch, 0 neither",
        "the contract does not hold",
    ):
        assert part in text


def test_a_drill_without_anything_broken_holds() -> None:
    report = replace(REPORT, cases=(CANCELS,))
    assert report.holds
    assert "the contract holds" in printed(report)


def test_a_report_is_json_and_a_picture(tmp_path: Path) -> None:
    assert json.loads(json.dumps(asdict(REPORT)))["cases"][0]["fault"] == "kill"
    draw_chart(REPORT, tmp_path / "drill.png")
    assert (tmp_path / "drill.png").read_bytes().startswith(b"\x89PNG")


def test_growth_is_told_by_name() -> None:
    assert OVERLOAD.before is not None
    assert OVERLOAD.after is not None
    grown = OVERLOAD.after.growth(OVERLOAD.before)
    assert (grown["resident_bytes"], grown["descriptors"], grown["threads"]) == (2.0, 1.0, 1.25)


def test_what_this_process_holds_is_measured_and_one_that_is_gone_is_left_out() -> None:
    residue = measure([os.getpid(), 2**22 - 3])
    assert residue.processes == 1
    assert min(residue.resident_bytes, residue.descriptors, residue.threads) > 0
