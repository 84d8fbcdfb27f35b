"""A drill as one picture: tokens a second over time, the turns with faults shaded, every fault a line."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cluster.drill.report import DrillReport, Picture, row_of

WIDTH_INCHES, ROW_INCHES = 12.0, 2.4
DPI = 150
_RATE, _FAULT, _TURN, _INK, _MUTED = "#2457a6", "#c8402a", "#fdf1e7", "#1f2937", "#6b7280"


def draw_chart(report: DrillReport, file: Path) -> None:
    """Writes the picture in the format of the file's suffix: a row for every fault under a steady load."""
    drawn = [case for case in report.cases if case.under_load is not None]
    figure = Figure(
        figsize=(WIDTH_INCHES, ROW_INCHES * max(1, len(drawn)) + 0.8),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    for index, case in enumerate(drawn):
        axes = figure.add_subplot(len(drawn), 1, index + 1)
        assert case.under_load is not None
        _draw_rate(axes, case.under_load.picture)
        row = row_of(case)
        axes.set_title(
            f"{case.title}: {row['times']} faults, {row['lost']} lost, {row['wrong tokens']} wrong tokens, "
            f"longest pause p99 {row['pause p99']} s, control {row['control p99']} s",
            fontsize=10,
            loc="left",
            color=_INK,
        )
    figure.supylabel("tokens a second", fontsize=9, color=_INK)
    machine = report.machine
    figure.supxlabel(
        f"seconds; shaded: turns with faults, red: from a fault until all processes are READY · "
        f"{machine.cpu}, {machine.cores} cores · {report.streams} streams, seed {report.seed}",
        fontsize=8,
        color=_MUTED,
    )
    figure.savefig(file)


def _draw_rate(axes: Axes, picture: Picture) -> None:
    for start_s, end_s in picture.turns:
        axes.axvspan(start_s, end_s, color=_TURN, zorder=0)
    for mark in picture.marks:
        end_s = mark.whole_s if mark.whole_s is not None else mark.healed_s
        axes.axvspan(mark.start_s, max(end_s, mark.start_s), color=_FAULT, alpha=0.12, linewidth=0)
        axes.axvline(mark.start_s, color=_FAULT, linewidth=0.8)
    times_s = [picture.step_s * index for index in range(len(picture.rates))]
    axes.step(times_s, picture.rates, where="post", color=_RATE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=8, colors=_INK)
