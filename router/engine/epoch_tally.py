"""How the sequences of one epoch do: what the controller judges a canary by."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moesaic.errors import MoesaicError
from router.dispatch.dispatcher import NOT_FINITE
from router.dispatch.shadow import ShadowTally

# The last times that quantiles are taken of.
TIMES_KEPT = 1024
# Epochs whose figures are kept, those that were used last.
EPOCHS_KEPT = 16


@dataclass(slots=True, eq=False)
class EpochTally:
    """Counters of one epoch. Only the engine's thread writes them; any thread may read them."""

    finished: int = 0
    failed: int = 0
    # Of `failed`: because values were not finite.
    not_finite: int = 0
    # Seconds between the tokens of a sequence, and from its admission to its first one.
    token_s: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES_KEPT))
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES_KEPT))
    shadow: ShadowTally = field(default_factory=ShadowTally)

    def note_failure(self, error: MoesaicError) -> None:
        self.failed += 1
        self.not_finite += error.reason == NOT_FINITE


class EpochTallies:
    """The tallies by epoch. Only the engine's thread adds to them."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[str, EpochTally] = OrderedDict()

    def of(self, epoch: str) -> EpochTally:
        tally = self._tallies.get(epoch)
        if tally is None:
            tally = self._tallies[epoch] = EpochTally()
            if len(self._tallies) > EPOCHS_KEPT:
                self._tallies.popitem(last=False)
        self._tallies.move_to_end(epoch)
        return tally

    def snapshot(self) -> Mapping[str, EpochTally]:
        return self._tallies.copy()


def quantile(times_s: Iterable[float], share: float) -> float:
    """0 where there are no times."""
    ordered = sorted(times_s)
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0
