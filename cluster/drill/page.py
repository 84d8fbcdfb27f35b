"""Writes the results of drills into docs/reliability.md: `python -m cluster.drill.page PAGE REPORT.json …`.

What stands between the two marks of the page is replaced, the picture beside the page, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from cluster.drill.chart import draw_chart
from cluster.drill.report import Case, DrillReport, details, row_of, seconds

BEGIN, END = "<!-- drill: written by `make drill` -->\n", "<!-- end of drill -->\n"
_COLUMNS = (
    *("fault", "minutes", "faults", "requests", "lost", "wrong tokens", "mixed"),
    *(
        "longest pause p50, p99, max, s",
        "the control's p99, s",
        "tokens/s over control",
        "whole again, s",
        "contract",
    ),
)


def main(page: Path, files: Sequence[Path]) -> None:
    reports = [TypeAdapter(DrillReport).validate_json(file.read_bytes()) for file in files]
    page.write_text(with_results(page.read_text(), reports))
    cases = tuple(case for report in reports for case in report.cases)
    draw_chart(replace(reports[0], cases=cases), page.with_suffix(".png"))


def with_results(text: str, reports: Sequence[DrillReport]) -> str:
    """The page's text with these results in place of the former ones."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "".join((before, BEGIN, *(f"{line}\n" for line in _lines(reports)), END, after))


def _lines(reports: Sequence[DrillReport]) -> Iterator[str]:
    machine = reports[0].machine
    yield (
        f"{machine.cpu}, {machine.cores} cores, moesaic {machine.packages.get('moesaic', '')}, "
        f"Ray {machine.packages.get('ray', '')}; {reports[0].streams} streams, seed {reports[0].seed}. "
        f"Other programs used up to {max(report.used_by_others for report in reports):.0%} of the machine."
    )
    yield ""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"|{' --- |' * len(_COLUMNS)}"
    for report in reports:
        yield from (_row(report, case) for case in report.cases)
    yield ""
    for report in reports:
        for case in report.cases:
            yield from (
                f"- {case.title}: {sentence}" for sentence in (*case.broken, *case.notes, *details(case))
            )


def _row(report: DrillReport, case: Case) -> str:
    row = row_of(case)
    load = case.under_load
    pauses = "-"
    if load is not None:
        pauses = ", ".join(
            seconds(value) for value in (load.pauses.p50_s, load.pauses.p99_s, load.pauses.max_s)
        )
    cells = (
        case.title,
        f"{report.minutes:g}",
        *(row[name] for name in ("times", "requests", "lost", "wrong tokens", "mixed")),
        pauses,
        row["control p99"],
        row["rate"],
        row["whole again"],
        "**broken**" if case.broken else "holds",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])
