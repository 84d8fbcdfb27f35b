"""How long a call waits for calls of other callers: pure, the clock is the caller's.

Routers that share a worker walk through the same layers. Two whose calls for a layer come within half a pass of each
other gain by sharing it: the first loses at most half a pass, the second does not wait for a whole one. So the first
waits, but only for callers that, by their own history, are about to ask for this very layer, only while joined passes
have been seen to be cheaper than passes one by one, and never beyond a bound. Alone, or without history, it never waits.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

# Share of the newest measurement in a running mean.
NEWEST = 0.2
# A caller is expected within its mean pause and so many mean deviations of it.
DEVIATIONS = 2.0
# What is older says nothing about now.
FORGET_S = 1.0


@dataclass(slots=True)
class _Mean:
    """A running mean, and the running mean of the distance from it."""

    value: float | None = None
    deviation: float = 0.0

    def add(self, sample: float) -> None:
        if self.value is None:
            self.value = sample
            return
        self.deviation += NEWEST * (abs(sample - self.value) - self.deviation)
        self.value += NEWEST * (sample - self.value)


@dataclass(slots=True)
class _Caller:
    """What is known of one caller."""

    in_flight: int = 0
    layer: int = -1
    answered_s: float = 0.0
    # By layer: what came before it, and the pause between that answer and this call.
    before: dict[int, int] = field(default_factory=dict)
    pauses: dict[int, _Mean] = field(default_factory=dict)


class MergeWait:
    """Told of every call and every pass, it says until when a pass had better not start."""

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._callers: dict[Hashable, _Caller] = {}
        # Seconds of a pass with one call, and seconds per call of a pass with several.
        self._alone, self._joined = _Mean(), _Mean()

    def came(self, caller: Hashable, layer: int, now_s: float) -> None:
        """A call was queued."""
        known = self._callers.get(caller) or self._meet(caller, now_s)
        if known.in_flight == 0 and now_s - known.answered_s < FORGET_S:
            known.before[layer] = known.layer
            known.pauses.setdefault(layer, _Mean()).add(now_s - known.answered_s)
        known.in_flight += 1
        known.layer = layer

    def left(self, caller: Hashable, now_s: float) -> None:
        """A call was answered, or dropped."""
        if known := self._callers.get(caller):
            known.in_flight -= 1
            known.answered_s = now_s

    def passed(self, num_calls: int, seconds: float) -> None:
        """A pass was computed."""
        if num_calls == 1:
            self._alone.add(seconds)
        else:
            self._joined.add(seconds / num_calls)

    def until(self, layer: int, waiting: AbstractSet[Hashable], since_s: float, now_s: float) -> float:
        """When a pass of `layer` should start that waits since `since_s`: now or earlier unless waiting pays."""
        if len(self._callers) <= len(waiting):  # nobody is left to wait for
            return 0.0
        latest_s = since_s + min(self._max_wait_s, self._worth_s())
        due = [
            due_s
            for caller, known in self._callers.items()
            if caller not in waiting and now_s < (due_s := _due_s(known, layer)) <= latest_s
        ]
        return max(due, default=0.0)

    def _meet(self, caller: Hashable, now_s: float) -> _Caller:
        """A new caller; those that have not been heard of for long are forgotten."""
        self._callers = {
            key: known
            for key, known in self._callers.items()
            if known.in_flight or now_s - known.answered_s < FORGET_S
        }
        return self._callers.setdefault(caller, _Caller())

    def _worth_s(self) -> float:
        """The longest wait that pays. One by one, two calls end after one pass and after two, 3 x alone in sum; together
        after wait + 2 x joined each."""
        if self._alone.value is None or self._joined.value is None:
            return 0.0
        return max(0.0, 1.5 * self._alone.value - 2 * self._joined.value)


def _due_s(known: _Caller, layer: int) -> float:
    """When the caller is expected to have asked for `layer`; 0 when it is not."""
    pause = known.pauses.get(layer)
    if known.in_flight or pause is None or pause.value is None or known.before[layer] != known.layer:
        return 0.0
    return known.answered_s + pause.value + DEVIATIONS * pause.deviation
