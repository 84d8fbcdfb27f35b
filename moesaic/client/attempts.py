"""The attempts of one call: how much time is left, and whether and when the call is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from moesaic.errors import MoesaicError, Overloaded, Unavailable

MAX_RETRIES = 5


class Attempts:
    """One call under one deadline.

    A failed attempt is repeated where the server has said, by a RetryInfo, that waiting helps. The delay is
    the server's, doubled with every retry, and up to a quarter longer at random, so that clients which were
    refused together do not come back together.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        retries: bool,
        now: Callable[[], float] = time.monotonic,
        random_share: Callable[[], float] = random.random,
    ) -> None:
        self.timeout_s = timeout_s
        self._deadline_s = now() + timeout_s
        self._retries_left = MAX_RETRIES if retries else 0
        self._factor = 1.0
        self._now = now
        self._random_share = random_share

    @property
    def time_left_s(self) -> float:
        return max(0.0, self._deadline_s - self._now())

    def delay_after(self, failure: MoesaicError) -> float | None:
        """The seconds to wait before the next attempt; None where the failure is final."""
        if not isinstance(failure, Unavailable | Overloaded) or failure.retry_after_s is None:
            return None
        if not self._retries_left:
            return None
        delay_s = failure.retry_after_s * self._factor * (1 + self._random_share() / 4)
        if delay_s >= self.time_left_s:
            return None
        self._retries_left -= 1
        self._factor *= 2
        return delay_s
