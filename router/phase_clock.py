"""Where a step's time goes: seconds per phase, added up over all steps of the process."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from time import perf_counter


class Phase(enum.StrEnum):
    """The phases of a step, in their order. The values are their names in the statistics."""

    SCHEDULE = "schedule"
    ATTENTION = "attention"
    GATE = "gate"
    ENCODE = "encode"
    # What the router waited beyond the slowest worker's own time, which the four `WORKER_` phases hold.
    WIRE = "wire"
    WORKER_DECODE = "worker decode"
    WORKER_QUEUE = "worker queue"
    WORKER_COMPUTE = "worker compute"
    WORKER_ENCODE = "worker encode"
    DECODE = "decode"
    COMBINE = "combine"
    # The rest of the model's forward: projections, norms, embeddings, the head.
    DENSE = "dense"
    SAMPLE = "sample"
    DELIVER = "deliver"


# The phases that are measured inside the model's forward; what they leave of it is `DENSE`.
INSIDE_FORWARD = tuple(Phase)[tuple(Phase).index(Phase.ATTENTION) : tuple(Phase).index(Phase.DENSE)]


class PhaseTimer:
    """A context manager that adds the time spent in its block to one phase. It does not nest in itself."""

    __slots__ = ("_started_s", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started_s = 0.0

    def __enter__(self) -> None:
        self._started_s = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._started_s


class PhaseClock:
    """Written by the engine's thread alone; any thread may read a snapshot."""

    def __init__(self) -> None:
        # One timer serves all blocks of its phase: several phases are entered in every layer.
        self._timers = {phase: PhaseTimer() for phase in Phase}

    def phase(self, phase: Phase) -> PhaseTimer:
        """Measures a block: `with clock.phase(Phase.GATE): ...`."""
        return self._timers[phase]

    def add(self, phase: Phase, seconds: float) -> None:
        """Adds time that was measured elsewhere."""
        self._timers[phase].seconds += seconds

    def total(self, phases: Sequence[Phase]) -> float:
        return sum(self._timers[phase].seconds for phase in phases)

    def snapshot(self) -> Mapping[str, float]:
        return {phase.value: timer.seconds for phase, timer in self._timers.items()}
