"""What is read out of a decoder while it computes a sequence: the hidden states that enter a layer, or that its gate sees.

Shapes: T tokens of a micro-batch, D hidden size, n rows of one sequence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Capture(Protocol):
    """Takes hidden states of one sequence, layer by layer, for each layer with a gate. Called on the engine's thread. A
    sequence that starts over is computed, and captured, again."""

    def residual(self, layer: int, position: int, rows: Tensor) -> None:
        """The residual stream [n, D] that enters the layer, from this position of the sequence on."""
        ...

    def gate_input(self, layer: int, position: int, rows: Tensor) -> None:
        """What the gate of the layer sees, [n, D]."""
        ...


@dataclass(frozen=True, slots=True)
class CapturedRows:
    """The rows [start, end) of a micro-batch, which begin at a position of their sequence."""

    capture: Capture
    start: int
    end: int
    position: int


def captured_among(captures: Sequence[CapturedRows], tokens: Sequence[int]) -> list[CapturedRows]:
    """The same in a micro-batch that has only these tokens left, which ascend and hold all captured ones."""
    return [
        CapturedRows(one.capture, bisect_left(tokens, one.start), bisect_left(tokens, one.end), one.position)
        for one in captures
    ]


def capture_residual(captures: Sequence[CapturedRows], layer: int, hidden: Tensor) -> None:
    """`hidden` [T, D] enters the layer."""
    for one in captures:
        one.capture.residual(layer, one.position, hidden[one.start : one.end])


def capture_gate_input(captures: Sequence[CapturedRows], layer: int, hidden: Tensor) -> None:
    """The layer's gate sees `hidden` [T, D]."""
    for one in captures:
        one.capture.gate_input(layer, one.position, hidden[one.start : one.end])
