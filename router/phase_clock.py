"""Where a step's time goes: seconds per named part, added up over all steps of the process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

PHASES = (
    "schedule",
    "attention",
    "gate",
    "encode",
    "wire",
    "worker decode",
    "worker queue",
    "worker compute",
    "worker encode",
    "decode",
    "combine",
    "dense",
    "sample",
    "deliver",
)

# Measured inside the model's forward by the three seams; what is left of it is "dense".
INSIDE_FORWARD = PHASES[PHASES.index("attention") : PHASES.index("dense")]


class PhaseClock:
    """Written by the engine's thread alone; read as a snapshot by anyone.

    `wire` is what the router waited beyond the slowest worker's own time, which is in the `worker` phases.
    `dense` is the rest of the model: projections, norms, embeddings, the head.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds

    def total(self, phases: tuple[str, ...]) -> float:
        return sum(self._seconds[phase] for phase in phases)

    def snapshot(self) -> Mapping[str, float]:
        return {phase: self._seconds.get(phase, 0.0) for phase in PHASES}
