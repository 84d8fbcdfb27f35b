"""How long calls take, by their size: what is usual and what is late. Pure.

Calls are of one kind when their numbers of rows have the same number of binary digits. Of each kind the last calls to
all replicas are kept, so that a late call is told from a large one, and a slow replica from a slow model.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

# Calls of a kind that are kept, and after how many the quantiles are taken again.
KEPT = 64
REFRESH = 16
# What is usual is told by the faster calls: half of all may be those of a replica that is slow.
USUAL_QUANTILE = 0.25
LATE_QUANTILE = 0.95


@dataclass(slots=True, eq=False)
class _Kind:
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    # How many calls have come since the quantiles were taken.
    fresh: int = 0
    usual_s: float | None = None
    late_s: float | None = None

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.fresh += 1
        if self.fresh >= REFRESH:
            self.fresh = 0
            ordered = sorted(self.seconds)
            self.usual_s = ordered[int(USUAL_QUANTILE * (len(ordered) - 1))]
            self.late_s = ordered[int(LATE_QUANTILE * (len(ordered) - 1))]


class CallTimes:
    """The times of the calls of one router."""

    def __init__(self) -> None:
        self._kinds: defaultdict[int, _Kind] = defaultdict(_Kind)

    def add(self, num_rows: int, seconds: float) -> float | None:
        """Counts a call. Returns how many times as long as usual it took; None while nothing is known of its kind."""
        kind = self._kinds[num_rows.bit_length()]
        kind.add(seconds)
        return seconds / kind.usual_s if kind.usual_s else None

    def late_s(self, num_rows: int) -> float | None:
        """The seconds that 95 % of the calls of this size take at most; None while too few were made."""
        kind = self._kinds.get(num_rows.bit_length())
        return None if kind is None else kind.late_s
