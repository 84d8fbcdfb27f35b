"""The model against its measurements, and its forecast for larger clusters, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from steps.clusters import Forecast
from steps.fit import Point
from steps.model import Step

INK, PAPER, GRID = "#22303c", "#ffffff", "#dfe5ea"
# Steps of more rows read prompts, and take far longer.
DECODE_ROWS = 64
PARTS = (("router", "#4c78a8"), ("compute", "#f2a65a"), ("overhead", "#c8553d"))
LINES = ("#4c78a8", "#c8553d", "#3a7d44", "#8a63a8")
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


def draw(
    file: Path,
    points: Sequence[Point],
    modelled: Sequence[Step],
    simulated: Sequence[float],
    forecasts: Mapping[str, Forecast],
) -> None:
    """Writes a PNG with the measured steps beside the modelled ones, and tokens per second over nodes."""
    decode = [index for index, point in enumerate(points) if point.load.rows <= DECODE_ROWS]
    prompts = [index for index in range(len(points)) if index not in decode]
    with pyplot.rc_context(STYLE):
        widths = (len(decode), max(1, len(prompts)), 7)
        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 5), width_ratios=widths)
        for axes, some in ((left, decode), (middle, prompts)):
            _measured(
                axes, [points[i] for i in some], [modelled[i] for i in some], [simulated[i] for i in some]
            )
        left.set_ylabel("ms a step")
        left.set_title("Measured (left bars), modelled (right bars)", loc="left", fontweight="bold")
        left.legend(frameon=False, loc="upper left", ncols=4)
        left.set_xlabel("workers on this host, rows a step")
        middle.set_title("A prompt", loc="left", fontweight="bold")
        _forecast(right, forecasts)
        figure.tight_layout(w_pad=2)
        figure.savefig(file, dpi=120)
        pyplot.close(figure)


def _measured(
    axes: Axes, points: Sequence[Point], modelled: Sequence[Step], simulated: Sequence[float]
) -> None:
    width = 0.38
    for side, (steps, alpha) in enumerate(((points, 1.0), (modelled, 0.55))):
        places = [index + (side - 0.5) * width for index in range(len(points))]
        bottoms = [0.0] * len(points)
        for part, colour in PARTS:
            heights = [1000 * getattr(step, f"{part}_s") for step in steps]
            label = part if side == 0 else None
            axes.bar(places, heights, width * 0.94, bottom=bottoms, color=colour, alpha=alpha, label=label)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.plot(
        [index + width / 2 for index in range(len(points))],
        [1000 * seconds for seconds in simulated],
        "o",
        markersize=5,
        markerfacecolor=PAPER,
        markeredgecolor=INK,
        label="simulated",
    )
    axes.set_xticks(range(len(points)), [point.name for point in points], fontsize=8.5)
    axes.set_ylim(0, 1.15 * max((point.total_s * 1000 for point in points), default=1.0))
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)


def _forecast(axes: Axes, forecasts: Mapping[str, Forecast]) -> None:
    for (name, forecast), colour in zip(forecasts.items(), LINES, strict=False):
        nodes = list(forecast.by_nodes)
        together = [saturation.tokens_per_s for saturation in forecast.by_nodes.values()]
        axes.plot(nodes, together, "o-", color=colour, label=name)
        axes.plot(nodes, [forecast.tokens_per_s] * len(nodes), ":", color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(number) for number in nodes])
    axes.set_yscale("log")
    axes.set_xlabel(f"nodes; {forecast.rows} rows a step and router")
    axes.set_ylabel("tokens per second")
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_title("On paper: all nodes busy (dotted: one router)", loc="left", fontweight="bold")
