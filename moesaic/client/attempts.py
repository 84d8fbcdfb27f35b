"""The attempts of one call: how much time is left, and whether and when the call is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from moesaic.errors import MoesaicError, Overloaded, Unavailable

# How often a call is repeated that was refused for the moment.
MAX_RETRIES = 5
# How many routers may be lost in the middle of one answer.
MAX_RESUMES = 16
# The error reasons of a call for which there was no router, and of one that lost the connection to it.
NO_ROUTER = "NO_ROUTER"
ROUTER_UNREACHABLE = "ROUTER_UNREACHABLE"

_LOST = frozenset({NO_ROUTER, ROUTER_UNREACHABLE, "STOPPING"})
# What a router says of itself alone: it starts, stops or is full, or does not hold the epoch (yet, or any more).
_REFUSED = frozenset({"LOADING", "NOT_READY", "DRAINING", "QUEUE_FULL", "EPOCH_UNKNOWN", "EXPERTS_MISSING"})
# What a router says that was told to stop: it is not awaited, for nothing says that it will be back.
_LEAVING = frozenset({"STOPPING", "DRAINING"})
# Refusals that waiting may not cure.
_LASTING = frozenset({"EPOCH_UNKNOWN", "EXPERTS_MISSING"})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


def is_lost(failure: MoesaicError) -> bool:
    """Whether the router died, went away or stops, so that what it began can be had from another."""
    return failure.reason in _LOST


def is_refusal(failure: MoesaicError) -> bool:
    """Whether another router, or the same one later, may take what this one refuses."""
    return isinstance(failure, Overloaded) or failure.reason in _REFUSED


class Attempts:
    """One call under one deadline.

    A refusal is repeated where the server has said, by a RetryInfo, that waiting helps. The delay is the
    server's, doubled with every retry, and up to a quarter longer at random, so that clients which were
    refused together do not come back together.

    A router that is lost, or refuses, is replaced by another one at once. Where there is no other, a router that has
    answered before is awaited, with pauses of 0.1 to 2 s; one that never answered, or that was told to stop, is not.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        retries: bool,
        num_routers: int = 1,
        now: Callable[[], float] = time.monotonic,
        random_share: Callable[[], float] = random.random,
    ) -> None:
        """`num_routers`: how many the caller asks in turn."""
        self.timeout_s = timeout_s
        self._deadline_s = now() + timeout_s
        self._retries = retries
        self._num_routers = num_routers
        self._retries_left = MAX_RETRIES
        self._resumes_left = MAX_RESUMES
        self._factor = 1.0
        # Whether a router has answered: in this attempt, and in any.
        self._answers = False
        self._has_answered = False
        # How many attempts in a row had no answer.
        self._in_vain = 0
        self._now = now
        self._random_share = random_share

    @property
    def time_left_s(self) -> float:
        return max(0.0, self._deadline_s - self._now())

    def note_answer(self) -> None:
        """Records that a part of the answer has arrived."""
        self._answers = self._has_answered = True
        self._in_vain = 0

    def delay_after(self, failure: MoesaicError, *, begun: bool = False) -> float | None:
        """The seconds to wait before the next attempt; None where the failure is final.

        `begun`: whether a token has arrived, so that only the rest of the answer can be asked for.
        """
        delay_s = None
        if is_lost(failure) or is_refusal(failure):
            waits = begun or (is_lost(failure) and self._has_answered)
            delay_s = self.delay_after_loss(failure, waits=waits and failure.reason not in _LEAVING)
        if delay_s is None and not begun:
            delay_s = self._after_refusal(failure)
        return delay_s

    def delay_after_loss(self, failure: MoesaicError, *, waits: bool = True) -> float | None:
        """The same for a router that is lost or refuses. `waits`: whether one is awaited when all have been asked."""
        answered, self._answers = self._answers, False
        self._in_vain += 1
        self._resumes_left -= answered
        if not self._retries or self._resumes_left < 0:
            return None
        if self._in_vain < self._num_routers:
            return 0.0
        if not waits:
            return None
        if failure.reason in _LASTING:
            self._retries_left -= 1
        if self._retries_left < 0:
            return None
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (self._in_vain - self._num_routers), _LONGEST_PAUSE_S)
        return self._in_time(pause_s)

    def _after_refusal(self, failure: MoesaicError) -> float | None:
        if not isinstance(failure, Unavailable | Overloaded) or failure.retry_after_s is None:
            return None
        if not self._retries or not self._retries_left:
            return None
        delay_s = self._in_time(failure.retry_after_s * self._factor)
        self._retries_left -= 1
        self._factor *= 2
        return delay_s

    def _in_time(self, delay_s: float) -> float | None:
        """Up to a quarter more; None if the deadline comes first."""
        delay_s *= 1 + self._random_share() / 4
        return delay_s if delay_s < self.time_left_s else None
