"""The sequences that lack an expert for now: when they are tried again, and when their wait is over. No I/O.

All of them are tried together, so that however many they are, the others are held up once. They are tried when the replicas
have changed, and else after a pause that is at least as long as the last try took: what waits takes no more than half of
the time from what runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from moesaic.errors import DeadlineExceeded, MoesaicError
from router.engine.live_sequence import LiveSequence

PAUSE_S = 0.25
# How often it is looked whether the replicas have changed while nothing else runs.
POLL_S = 0.05
# A wait ends so long before the deadline of its request, so that the caller still learns what was missing.
MARGIN_S = 0.25


@dataclass(slots=True, eq=False)
class _Wait:
    live: LiveSequence
    since_s: float
    # Why its last try failed, and when the next one is due at the latest; infinite while it is being tried.
    error: MoesaicError
    retry_s: float


class ExpertWaits:
    """The waits of an engine. A wait lasts from the first try that fails to the first that does not."""

    def __init__(self, max_wait_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._waits: dict[str, _Wait] = {}
        # What the replicas were when the sequences were tried last.
        self._replicas: object = None

    def __len__(self) -> int:
        return len(self._waits)

    def note(self, live: LiveSequence, error: MoesaicError, took_s: float, replicas: object) -> None:
        """A try of `took_s` seconds has failed. `replicas`: another object after every change of them."""
        now_s = self._clock()
        retry_s = now_s + max(PAUSE_S, took_s)
        wait = self._waits.get(live.request.sequence_id)
        if not self._waits:
            self._replicas = replicas
        if wait is None:
            self._waits[live.request.sequence_id] = _Wait(live, now_s, error, retry_s)
        else:
            wait.error, wait.retry_s = error, retry_s

    def end(self, live: LiveSequence) -> None:
        """The sequence has its expert, or needs it no more. Also where it did not wait."""
        self._waits.pop(live.request.sequence_id, None)

    def take_due(self, replicas: object) -> list[LiveSequence]:
        """The sequences that are to be tried now: all or none."""
        now_s = self._clock()
        changed = replicas is not self._replicas
        if not changed and all(wait.retry_s > now_s for wait in self._waits.values()):
            return []
        self._replicas = replicas
        for wait in self._waits.values():
            wait.retry_s = math.inf
        return [wait.live for wait in self._waits.values()]

    def over(self) -> list[tuple[LiveSequence, MoesaicError]]:
        """The sequences whose wait is over, each with the error that ends it."""
        now_s = self._clock()
        return [
            (wait.live, _error(wait, now_s)) for wait in self._waits.values() if self._end_s(wait) <= now_s
        ]

    def next_s(self) -> float | None:
        """When `take_due` and `over` are to be asked again at the latest; None while nobody waits."""
        return self._clock() + POLL_S if self._waits else None

    def _end_s(self, wait: _Wait) -> float:
        return min(wait.since_s + self._max_wait_s, wait.live.request.deadline_s - MARGIN_S)


def _error(wait: _Wait, now_s: float) -> MoesaicError:
    cause, num_tokens = wait.error, len(wait.live.sequence.output)
    if wait.live.request.deadline_s - MARGIN_S <= now_s:
        return DeadlineExceeded(f"deadline passed after {num_tokens} tokens: {cause.message}")
    return type(cause)(
        f"{cause.message}; waited {now_s - wait.since_s:.0f} s for it after {num_tokens} tokens",
        reason=cause.reason,
        retry_after_s=cause.retry_after_s,
    )
