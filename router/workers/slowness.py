"""How slow a replica is beside the usual, so that a slow one gets few calls while another one can be asked. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# The weight of one call in the average, and the most that one call counts as.
WEIGHT = 0.1
MAX_RATIO = 16.0
# A replica below this is as good as any other.
SLOW = 3.0
# What was measured counts half as much after so many seconds. A replica that is not called because it was slow is thus
# measured again every few seconds, with one call.
HALF_LIFE_S = 4.0


@dataclass(slots=True, eq=False)
class Slowness:
    """A moving average of how many times as long as usual the calls to one replica take."""

    _average: float = 1.0
    _measured_s: float = 0.0

    def note(self, ratio: float, now_s: float) -> None:
        """A call took `ratio` times as long as usual."""
        average = self._faded(now_s)
        self._average = average + WEIGHT * (min(ratio, MAX_RATIO) - average)
        self._measured_s = now_s

    def factor(self, now_s: float) -> float:
        """How many times as long as usual the next call may take; 1 unless that is clearly longer."""
        if self._average < SLOW:
            return 1.0
        faded = self._faded(now_s)
        return faded if faded >= SLOW else 1.0

    def _faded(self, now_s: float) -> float:
        if self._average <= 1.0:
            return self._average
        return float(1.0 + (self._average - 1.0) * 0.5 ** ((now_s - self._measured_s) / HALF_LIFE_S))
