"""Whether a replica is called, decided from what its calls and its heartbeat show. Pure: times are passed in.

    CLOSED       it is called
    SUSPECT      something is wrong; it is called only where nobody else can be, and probed at once
    OPEN         it is not called; it is probed until it answers
    QUARANTINED  it gave wrong answers; the same, with growing pauses between the probes
    HALF_OPEN    OPEN or QUARANTINED while a probe is on its way

A replica comes back with the first probe that it answers, within milliseconds, so that it costs little to be quick
with suspicion. Probes are sent one at a time.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

# A replica without a right answer for so long is probed, although nothing speaks against it.
IDLE_S = 1.0
# The pause between two probes of a replica that is not called.
PROBE_PAUSE_S = 0.1
# How long a probe is waited for.
PROBE_TIMEOUT_S = 0.5
# So long a replica may answer no probe because it is busy.
BUSY_S = 5.0
# Consecutive failures that open a circuit; the first one makes its replica a suspect.
FAILURES_TO_OPEN = 2
# So many wrong answers within this time put a replica into quarantine.
WRONG_ANSWERS = 3
WRONG_WINDOW_S = 10.0
# The pause before the first probe of a replica in quarantine; it doubles with every relapse, up to the longest.
QUARANTINE_S = 1.0
MAX_QUARANTINE_S = 60.0


class CircuitState(StrEnum):
    """Statistics use these names."""

    CLOSED = "closed"
    SUSPECT = "suspect"
    OPEN = "open"
    HALF_OPEN = "half-open"
    QUARANTINED = "quarantined"


class Circuit:
    """The circuit of one replica."""

    def __init__(self, now_s: float) -> None:
        # Never HALF_OPEN: that is told by `probing`.
        self._state = CircuitState.CLOSED
        self.probing = False
        # No probe is sent before.
        self._next_probe_s = now_s
        # The last right answer; before the first, when the replica became known.
        self._well_s = now_s
        # Consecutive ones.
        self._failures = 0
        self._wrong_s: deque[float] = deque(maxlen=WRONG_ANSWERS)
        self._quarantine_s = QUARANTINE_S

    @property
    def state(self) -> CircuitState:
        return CircuitState.HALF_OPEN if self.probing and not self.lets_calls_through else self._state

    @property
    def is_closed(self) -> bool:
        """Whether nothing speaks against the replica."""
        return self._state is CircuitState.CLOSED

    @property
    def lets_calls_through(self) -> bool:
        return self._state is CircuitState.CLOSED or self._state is CircuitState.SUSPECT

    def note_right(self, now_s: float) -> None:
        """A right answer to a call, maybe to one that was sent before the circuit opened. It ends no quarantine."""
        self._well_s = now_s
        self._failures = 0
        if self._state is not CircuitState.QUARANTINED:
            self._state = CircuitState.CLOSED

    def note_failure(self, now_s: float) -> None:
        """A call failed, or the probe of a suspect."""
        self._failures += 1
        if self._failures < FAILURES_TO_OPEN:
            self.suspect(now_s)
        else:
            self.open(now_s)

    def note_late(self, now_s: float) -> None:
        """Another replica was asked in its place and answered first."""
        self._failures = max(1, self._failures)
        self.suspect(now_s)

    def suspect(self, now_s: float) -> None:
        """Others are preferred until it has answered."""
        if self.is_closed:
            self._state = CircuitState.SUSPECT
            self._next_probe_s = now_s

    def open(self, now_s: float) -> None:
        """Nobody calls it until it has answered a probe."""
        if self._state is not CircuitState.QUARANTINED:
            self._state = CircuitState.OPEN
            self._next_probe_s = now_s + PROBE_PAUSE_S

    def note_wrong(self, now_s: float) -> bool:
        """An answer was wrong. Whether this puts the replica into quarantine."""
        self._wrong_s.append(now_s)
        if self._state is CircuitState.QUARANTINED:
            return False
        if len(self._wrong_s) < WRONG_ANSWERS or now_s - self._wrong_s[0] > WRONG_WINDOW_S:
            self.suspect(now_s)
            return False
        self._begin_quarantine(now_s)
        return True

    def is_probe_due(self, now_s: float) -> bool:
        if self.probing:
            return False
        if self.is_closed:
            return now_s - self._well_s >= IDLE_S
        return now_s >= self._next_probe_s

    def begin_probe(self) -> None:
        self.probing = True

    def pass_probe(self, now_s: float) -> None:
        """It answered. A quarantine that follows upon another one is twice as long."""
        self.probing = False
        self._state = CircuitState.CLOSED
        self._failures = 0
        self._well_s = now_s

    def fail_probe(self, now_s: float, *, is_silent: bool) -> None:
        """It answered wrongly or with an error, or did not answer in time. The last alone says little of a replica that
        nothing else speaks against: it may be computing something large."""
        self.probing = False
        if self._state is CircuitState.QUARANTINED:
            self._begin_quarantine(now_s)
            return
        if is_silent and not self._failures and now_s - self._well_s < BUSY_S:
            self.suspect(now_s)
        else:
            self.note_failure(now_s)
        self._next_probe_s = now_s + PROBE_PAUSE_S

    def _begin_quarantine(self, now_s: float) -> None:
        self._state = CircuitState.QUARANTINED
        self._next_probe_s = now_s + self._quarantine_s
        self._quarantine_s = min(MAX_QUARANTINE_S, 2 * self._quarantine_s)
