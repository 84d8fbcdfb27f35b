"""A benchmark as one picture: throughput, latency, and the phases of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cluster.bench.latency import WaveSummary
from cluster.bench.report import BenchReport, Duel, Level, Row
from router.phase_clock import Phase

SIZE_INCHES = (12.0, 7.0)
DPI = 150
OURS, OURS_LIGHT, THEIRS, MUTED = "#2457a6", "#9db8e0", "#c8702a", "#6b7280"
# From this share of a step on, a group's share is printed.
MIN_LABELLED_SHARE = 0.04
_INK, _LIGHT = "#1f2937", "white"


@dataclass(frozen=True, slots=True)
class PhaseGroup:
    """Phases that are drawn as one part of a step."""

    name: str
    meaning: str
    phases: frozenset[Phase]
    colour: str
    ink: str


# From the bottom to the top of a bar. Every phase belongs to one group.
GROUPS = (
    PhaseGroup(
        "router",
        "attention, gate, dense",
        frozenset({Phase.SCHEDULE, Phase.ATTENTION, Phase.GATE, Phase.COMBINE, Phase.DENSE}),
        "#2f5ea8",
        _LIGHT,
    ),
    PhaseGroup(
        "wire",
        "rows there and back",
        frozenset({Phase.ENCODE, Phase.WIRE, Phase.WORKER_DECODE, Phase.WORKER_ENCODE, Phase.DECODE}),
        "#dd7a2b",
        _LIGHT,
    ),
    PhaseGroup("queue", "waiting in a worker", frozenset({Phase.WORKER_QUEUE}), "#c9a227", _INK),
    PhaseGroup("compute", "the experts", frozenset({Phase.WORKER_COMPUTE}), "#3c8a57", _LIGHT),
    PhaseGroup("text", "sampling, delivery", frozenset({Phase.SAMPLE, Phase.DELIVER}), "#9ca3af", _INK),
)


def draw_chart(report: BenchReport, file: Path) -> None:
    """Writes the picture in the format of the file's suffix."""
    figure = Figure(
        figsize=SIZE_INCHES,
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.15))
    _draw_throughput(figure.add_subplot(grid[0, 0]), report)
    _draw_latency(figure.add_subplot(grid[1, 0]), report.rows)
    _draw_phases(figure.add_subplot(grid[:, 1]), report.rows)
    figure.suptitle(
        f"{report.model}: {report.prompt_len} tokens in, {report.output_len} out",
        fontsize=14,
        fontweight="bold",
        color=_INK,
    )
    machine = report.machine
    figure.supxlabel(
        f"{machine.cpu}, {machine.cores} cores · moesaic {machine.packages.get('moesaic', '')} · "
        f"torch {machine.packages.get('torch', '')}",
        fontsize=8,
        color=MUTED,
    )
    figure.savefig(file)


def _draw_throughput(axes: Axes, report: BenchReport) -> None:
    """Draws a bar for each load, and both sides of a comparison beside it."""
    series = [
        ("moesaic, this load", OURS, [row.load.output_tokens_per_s for row in report.rows]),
        (
            "moesaic, one batch",
            OURS_LIGHT,
            [_duel_rate(report, row, lambda duel: duel.ours) for row in report.rows],
        ),
        (
            "transformers, one batch",
            THEIRS,
            [_duel_rate(report, row, lambda duel: duel.theirs) for row in report.rows],
        ),
    ][: 3 if report.duels else 1]
    width = 0.75 / (len(series) + 0.5)
    for index, (name, colour, rates) in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * width
        bars = axes.bar(
            [place + shift for place in range(len(rates))], rates, width, color=colour, label=name
        )
        labels = [f"{rate:,.0f}" if rate else "" for rate in rates]
        axes.bar_label(bars, labels, fontsize=8 if report.duels else 9, color=_INK, padding=2)
    if report.duels:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.margins(y=0.18)
    _style(axes, report.rows, "Output tokens per second")


def _duel_rate(report: BenchReport, row: Row, side: Callable[[Duel], Sequence[WaveSummary]]) -> float:
    """The median rate of one side at this load; 0 where there was no comparison."""
    waves = [
        wave.output_tokens_per_s
        for duel in report.duels
        if row.level == Level(duel.streams)
        for wave in side(duel)
    ]
    return statistics.median(waves) if waves else 0.0


def _draw_latency(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws on a logarithmic scale, because first and later tokens take times of different magnitudes."""
    lines = (
        ("to the first token, p99", OURS, "--", [row.load.ttft.p99_ms for row in rows]),
        ("to the first token, p50", OURS, "-", [row.load.ttft.p50_ms for row in rows]),
        ("between tokens, p99", THEIRS, "--", [row.load.inter_token.p99_ms for row in rows]),
        ("between tokens, p50", THEIRS, "-", [row.load.inter_token.p50_ms for row in rows]),
    )
    for name, colour, dash, values in lines:
        points = [(place, value) for place, value in enumerate(values) if value]
        if points:
            axes.plot(*zip(*points, strict=True), dash, color=colour, marker="o", markersize=4, label=name)
    _plain_log_scale(axes)
    axes.margins(x=0.08, y=0.1)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0.0, 1.02))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)  # This leaves room for the legend.
    _style(axes, rows, "Latency, ms")


def _plain_log_scale(axes: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_phases(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws one step as a bar for each load; a group of phases has the same colour at every load."""
    bottoms = [0.0] * len(rows)
    for group in GROUPS:
        shares = [group_share(row, group) for row in rows]
        bars = axes.bar(
            range(len(rows)),
            shares,
            0.7,
            bottom=bottoms,
            color=group.colour,
            edgecolor="white",
            linewidth=0.5,
            label=f"{group.name}\n({group.meaning})",
        )
        labels = [f"{share:.0%}" if share >= MIN_LABELLED_SHARE else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", fontsize=9, color=group.ink)
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
    for place, row in enumerate(rows):
        axes.annotate(
            f"{row.profile.step_ms:.1f} ms",
            (place, bottoms[place]),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_INK,
        )
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        names[::-1],
        frameon=False,
        fontsize=9,
        labelspacing=1.2,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    axes.set_ylim(0.0, 1.06)
    axes.set_yticks([])
    _style(axes, rows, "Where a step goes")


def group_share(row: Row, group: PhaseGroup) -> float:
    """The group's part of an average step."""
    profile = row.profile
    spent_ms = sum(profile.phases_ms.get(phase, 0.0) for phase in group.phases)
    return spent_ms / profile.step_ms if profile.step_ms else 0.0


def _style(axes: Axes, rows: Sequence[Row], title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=_INK)
    axes.set_xticks(range(len(rows)), [row.level.label for row in rows])
    closed = all(row.level.rate is None for row in rows)
    axes.set_xlabel("streams at once" if closed else "streams at once, or requests a second", fontsize=9)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=9, colors=_INK)
