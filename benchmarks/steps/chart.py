"""Two pictures: the measured steps beside the modelled ones, and what the model says of larger clusters.

Bars that nobody measured are hatched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from steps.clusters import Forecast
from steps.fit import Point
from steps.model import Step

INK, PAPER, GRID = "#22303c", "#ffffff", "#dfe5ea"
# Steps of more rows read prompts, and take far longer.
DECODE_ROWS = 64
PARTS = {"router": "#4c78a8", "compute": "#f2a65a", "overhead": "#c8553d"}
SERIES = ("#4c78a8", "#c8553d", "#3a7d44", "#8a63a8")
HATCH = "////"
DPI = 120
STYLE: Any = {
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "hatch.color": PAPER,
    "hatch.linewidth": 1.2,
}


def draw_steps(
    file: Path, points: Sequence[Point], modelled: Sequence[Step], simulated: Sequence[float]
) -> None:
    """Writes a PNG with every measured step, and beside it the model's and the simulation's idea of it."""
    steps = list(zip(points, modelled, simulated, strict=True))
    decode = [step for step in steps if step[0].load.rows <= DECODE_ROWS]
    prompts = [step for step in steps if step[0].load.rows > DECODE_ROWS]
    panels = [("One decode step, measured beside modelled", decode)]
    panels += [("One prompt", prompts)] if prompts else []
    widths = [len(some) + 1 for _, some in panels]
    with _figure(file, (13, 5.4)) as figure:
        for axes, (title, some) in zip(
            figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0], panels, strict=True
        ):
            _draw_steps(axes, *zip(*some, strict=True))
            axes.set_title(title)
            axes.set_ylabel("milliseconds")
        figure.legend(handles=_legend_of_steps(), loc="outside lower center", ncols=6, frameon=False)


def draw_clusters(file: Path, forecasts: Mapping[str, Forecast]) -> None:
    """Writes a PNG with tokens per second of whole clusters, all of them on paper."""
    nodes = list(next(iter(forecasts.values())).by_nodes)
    with _figure(file, (13, 5.8)) as figure:
        axes = figure.subplots()
        width = 0.8 / len(forecasts)
        for index, ((name, forecast), colour) in enumerate(zip(forecasts.items(), SERIES, strict=False)):
            places = [place + (index - (len(forecasts) - 1) / 2) * width for place in range(len(nodes))]
            rates = [saturation.tokens_per_s for saturation in forecast.by_nodes.values()]
            bars = axes.bar(places, rates, width * 0.94, color=colour, hatch=HATCH, label=name)
            axes.bar_label(bars, [_rounded(rate) for rate in rates], padding=3, fontsize=9.5)
            axes.hlines(
                [forecast.tokens_per_s] * len(places),
                [place - width * 0.47 for place in places],
                [place + width * 0.47 for place in places],
                color=INK,
                linewidth=2,
                label="one router alone" if index == 0 else None,
            )
        _plain_log_scale(axes, min(forecast.tokens_per_s for forecast in forecasts.values()))
        axes.set_xticks(range(len(nodes)), [f"{number} nodes" for number in nodes])
        rows = next(iter(forecasts.values())).rows
        axes.set_ylabel("tokens per second, all routers together")
        axes.set_title(
            f"On paper, not measured: clusters whose nodes are all busy, {rows} sequences a router", pad=12
        )
        _finish(axes)
        figure.legend(loc="outside lower center", ncols=len(forecasts) + 1, frameon=False)


@contextmanager
def _figure(file: Path, inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the house style, written to `file` at the end of the block."""
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=inches, layout="constrained")
        yield figure
        figure.savefig(file, dpi=DPI)
        pyplot.close(figure)


def _draw_steps(
    axes: Axes, points: Sequence[Point], modelled: Sequence[Step], simulated: Sequence[float]
) -> None:
    """Two stacked bars a point, the measured one and the hatched modelled one, and the simulation's dot."""
    width = 0.4
    for side, steps in ((-0.5, points), (0.5, modelled)):
        places = [index + side * width for index in range(len(points))]
        bottoms = [0.0] * len(points)
        for part, colour in PARTS.items():
            heights = [1000 * getattr(step, f"{part}_s") for step in steps]
            hatch = HATCH if side > 0 else None
            axes.bar(places, heights, width * 0.94, bottom=bottoms, color=colour, hatch=hatch)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        if steps is points:
            for place, height in zip(places, bottoms, strict=True):
                axes.annotate(
                    f"{height:.0f}", (place, height), (0, 3), textcoords="offset points", ha="center"
                )
    axes.plot(
        [index + width / 2 for index in range(len(points))],
        [1000 * seconds for seconds in simulated],
        "o",
        markersize=6,
        markerfacecolor=PAPER,
        markeredgecolor=INK,
    )
    axes.set_xticks(range(len(points)), [_counted(point) for point in points])
    axes.set_xlim(-0.6, len(points) - 0.4)
    _finish(axes)


def _legend_of_steps() -> list[Any]:
    """The parts by colour, and where they come from by pattern."""
    dot = pyplot.Line2D([], [], marker="o", linestyle="", markerfacecolor=PAPER, markeredgecolor=INK)
    dot.set_label("simulated")
    grey = "#9aa5af"
    return [
        *(Patch(facecolor=colour, label=part) for part, colour in PARTS.items()),
        Patch(facecolor=grey, label="measured"),
        Patch(facecolor=grey, edgecolor=PAPER, hatch=HATCH, label="modelled"),
        dot,
    ]


def _counted(point: Point) -> str:
    workers, rows = point.load.workers, point.load.rows
    return f"{rows} row{'s' * (rows > 1)}\n{workers} worker{'s' * (workers > 1)}"


def _plain_log_scale(axes: Axes, lowest: float) -> None:
    """A logarithmic axis from the power of ten below `lowest` on, with powers of ten as plain numbers."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=10 ** math.floor(math.log10(lowest)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _rounded(number: float) -> str:
    """Two significant digits: an estimate has no more."""
    return f"{float(f'{number:.2g}'):,.10g}"


def _finish(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
