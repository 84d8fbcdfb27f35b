"""The page of results is replaced between its marks, and the page of the repository has them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from pydantic_core import to_json

from cluster.bench.machine import Machine
from cluster.drill.answers import Tally
from cluster.drill.contract import CONTRACT, Figures
from cluster.drill.faults import Fault
from cluster.drill.page import BEGIN, END, main, with_results
from cluster.drill.report import Cancels, Case, DrillReport
from cluster.drill.timeline import Spread

PAGE = Path(__file__).resolve().parents[4] / "docs" / "reliability.md"
CASE = Case(
    "cancel",
    Fault.CANCEL,
    "4 workers",
    "m",
    Figures(stop_s=0.5),
    ("work stopped late",),
    cancels=Cancels(1000, Spread(0.1, 0.5, 0.6), 0, Tally(16, 0, 0, 0, 0, {})),
)
REPORT = DrillReport(7, 2.0, 8, Machine("cpu", 2, 1, "3.11", {"ray": "2.60"}), 0.25, (CASE,))


def test_results_stand_between_the_marks_whatever_stood_there() -> None:
    page = with_results(f"before\n{BEGIN}old\n{END}after\n", [REPORT])
    assert page.startswith("before\n" + BEGIN)
    assert page.endswith(END + "after\n")
    assert "old" not in page
    assert "| cancel | 2 | 1,000 | 16 | 0 | 0 | 0 | - | - | - | - | **broken** |" in page
    assert "- cancel: work stopped late" in page
    assert with_results(page, [REPORT]) == page


def test_reports_are_read_from_their_files_and_drawn_beside_the_page(tmp_path: Path) -> None:
    report, page = tmp_path / "report.json", tmp_path / "page.md"
    report.write_bytes(to_json(asdict(replace(REPORT, seed=9)) | {"holds": False}))
    page.write_text(BEGIN + END)
    main(page, [report])
    assert "seed 9" in page.read_text()
    assert (tmp_path / "page.png").exists()


def test_the_repositorys_page_has_the_marks_and_a_promise_for_every_fault() -> None:
    text = PAGE.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    contract = text[: text.index(BEGIN)]
    assert all(f"| `{fault}`" in contract for fault in CONTRACT)
