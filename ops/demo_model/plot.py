"""The loss curve as an SVG, without a library: held-out loss per domain against tokens seen."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 50, 110, 62, 44
TITLE = "Loss of the demo model on held-out text"
SUBTITLE = "nats per token; arithmetic is never trained on; dashed: the loss on the training text"
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e")
NOT_CURVES = ("step", "tokens", "seconds", "balance")


@dataclass(frozen=True, slots=True)
class Note:
    """What happened at a share of the training, in lines of text."""

    share: float
    lines: tuple[str, ...]


def tokens_at(rows: list[dict[str, str]], share: float) -> float:
    """Millions of tokens seen after a share of the training's time, between the rows that enclose it."""
    moment = share * float(rows[-1]["seconds"])
    for before, after in itertools.pairwise(rows):
        start, end = float(before["seconds"]), float(after["seconds"])
        if moment <= end:
            part = (moment - start) / (end - start)
            return (int(before["tokens"]) + part * (int(after["tokens"]) - int(before["tokens"]))) / 1e6
    return int(rows[-1]["tokens"]) / 1e6


def spread(heights: dict[str, float], gap: float = 14) -> dict[str, float]:
    """Moves labels down until none overlaps the one above."""
    placed: dict[str, float] = {}
    for name in sorted(heights, key=heights.__getitem__):
        placed[name] = max(heights[name], max(placed.values(), default=-gap) + gap)
    return placed


def loss_curve(rows: list[dict[str, str]], note: Note) -> str:
    names = [name for name in rows[0] if name not in NOT_CURVES]
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    losses = {name: [float(row[name]) for row in rows] for name in names}
    low = int(min(min(values) for values in losses.values()))
    high = int(max(max(values) for values in losses.values())) + 1

    def x(millions: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * millions / tokens[-1]

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16" font-weight="bold">{TITLE}</text>',
        f'<text x="{LEFT}" y="44" fill="#555">{SUBTITLE}</text>',
    ]
    for loss in range(low, high + 1):
        parts.append(
            f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>'
        )
    for millions in range(0, int(tokens[-1]) + 1, 5):
        parts.append(
            f'<text x="{x(millions):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{millions}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        "million tokens seen</text>"
    )
    noted = x(tokens_at(rows, note.share))
    parts.append(
        f'<path d="M{noted:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#555" stroke-dasharray="2 3"/>'
        + "".join(
            f'<text x="{noted - 6:.1f}" y="{TOP + 12 + 15 * index}" text-anchor="end" fill="#555">{line}</text>'
            for index, line in enumerate(note.lines)
        )
    )
    labels = spread({name: y(values[-1]) for name, values in losses.items()})
    for name, colour in zip(names, COLOURS, strict=False):
        points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in zip(tokens, losses[name], strict=True))
        dash = ' stroke-dasharray="4 3"' if name == "train_loss" else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>'
            f'<text x="{WIDTH - RIGHT + 6}" y="{labels[name] + 4:.1f}" fill="{colour}">'
            f"{name.replace('_', ' ')}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
