"""When a late call is also asked of another replica, and how many calls beyond the necessary ones there may be. Pure.

A call that waits longer than nearly all of its kind do is hedged: another replica is asked for the same rows, and the
first right answer counts. Experts are pure functions, so this is always safe; but a router whose every call is late must
not make it worse. Hedges are at most 5 % of the calls, and hedges and retries together at most 10 %.
"""

from __future__ import annotations

from collections.abc import Iterator

# No call is hedged sooner: so long is a mere hiccup of a worker or a network.
MIN_DELAY_S = 0.02
# The delay while too few calls of a kind were made to tell what is late.
UNKNOWN_DELAY_S = 0.25
# A call that is this much later still, and at least as late, is given up on: its hedge counts as a retry.
OVERDUE = 4.0
OVERDUE_S = 0.25

HEDGE_SHARE = 0.05
EXTRA_SHARE = 0.10
# What may be spent at once when little was spent before: one replica that freezes under a few calls.
HEDGE_BURST = 8.0
EXTRA_BURST = 16.0


class Budget:
    """Earns a share of every call, up to `burst`; extra calls are paid from it."""

    def __init__(self, share: float, burst: float) -> None:
        self._share = share
        self._burst = burst
        self._saved = burst

    def earn(self) -> None:
        self._saved = min(self._burst, self._saved + self._share)

    def can_pay(self, num_calls: int) -> bool:
        return self._saved >= num_calls

    def pay(self, num_calls: int) -> None:
        self._saved -= num_calls


class ExtraCalls:
    """The extra calls of one router."""

    def __init__(self) -> None:
        self._hedges = Budget(HEDGE_SHARE, HEDGE_BURST)
        self._all = Budget(EXTRA_SHARE, EXTRA_BURST)

    def note_call(self) -> None:
        """A call was sent that had to be."""
        self._hedges.earn()
        self._all.earn()

    def may_retry(self) -> bool:
        """Whether one more call may be sent because another one failed; it is then paid for."""
        if not self._all.can_pay(1):
            return False
        self._all.pay(1)
        return True

    def may_hedge(self, num_calls: int, *, is_overdue: bool) -> bool:
        """Whether so many calls may be sent in place of one that is late; they are then paid for."""
        if not self._all.can_pay(num_calls) or not (is_overdue or self._hedges.can_pay(num_calls)):
            return False
        self._all.pay(num_calls)
        if not is_overdue:
            self._hedges.pay(num_calls)
        return True


def hedge_delays_s(late_s: float | None) -> Iterator[tuple[float, bool]]:
    """After how many seconds a call is to be hedged, and, in case it was not, when it is overdue. `late_s`: what nearly
    all calls of its kind take at most."""
    delay_s = UNKNOWN_DELAY_S if late_s is None else max(MIN_DELAY_S, late_s)
    yield delay_s, False
    yield max(OVERDUE_S, OVERDUE * delay_s), True
