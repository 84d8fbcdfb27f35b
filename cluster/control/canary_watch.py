"""Rolls an epoch on trial back by itself, when what routers report of it, or its golden prompts, are beyond a limit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cluster.control.change import Changes
from cluster.control.change_order import ChangeOrder
from cluster.control.epochs_in_use import EpochsInUse
from cluster.control.router_reports import RouterReports
from cluster.control.verdict import EpochFigures, Verdict, judge
from moesaic.errors import Aborted, MoesaicError
from moesaic.settings import RolloutSettings

log = logging.getLogger(__name__)

LOOK_S = 1.0
# Golden prompts that could not be measured are tried again after so many looks.
_LOOKS_BETWEEN = 5
OPERATOR = "controller"

# The drift between two epochs on a router at HOST:PORT. Raises MoesaicError.
MeasureDrift = Callable[[str, tuple[str, str]], Awaitable[float]]


@dataclass
class _Golden:
    """The golden prompts of one trial."""

    canary: str
    drift: float | None = None
    looks: int = 0


class CanaryWatch:
    """Looks at the trial every second, while there is one."""

    def __init__(
        self,
        epochs: EpochsInUse,
        reports: RouterReports,
        changes: Changes,
        limits: RolloutSettings,
        measure_drift: MeasureDrift | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epochs = epochs
        self._reports = reports
        self._changes = changes
        self._limits = limits
        self._measure_drift = measure_drift
        self._clock = clock
        self._golden = _Golden("")

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Judges the trial once, if there is one."""
        canary = self._epochs.canary
        if canary is None:
            return
        await self._measure(canary.id)
        head, verdict = self._epochs.head, self.verdict()
        if head is None or verdict is None or not verdict.roll_back:
            return
        log.warning("canary rolled back", extra={"fields": {"epoch": canary.id, "reason": verdict.detail}})
        order = ChangeOrder("rollback", expected_epoch=head.current, operator=OPERATOR, reason=verdict.detail)
        try:
            self._changes.begin(order)
        except Aborted:  # an operator is at it; the next look judges what came of that
            return

    def verdict(self) -> Verdict | None:
        """On the epoch on trial; None without one."""
        head = self._epochs.head
        if head is None or head.canary is None:
            return None
        canary, baseline = (
            EpochFigures.of(self._reports.of_epoch(epoch)) for epoch in (head.canary.epoch, head.current)
        )
        drift = self._golden.drift if self._golden.canary == head.canary.epoch else None
        return judge(canary, baseline, drift, self._limits)

    async def _measure(self, canary: str) -> None:
        if self._golden.canary != canary:
            self._golden = _Golden(canary)
        golden, head, now_s = self._golden, self._epochs.head, self._clock()
        if self._measure_drift is None or golden.drift is not None or head is None:
            return
        using, heard = self._reports.spread(head, now_s)
        golden.looks += bool(heard and using == heard)
        if golden.looks % _LOOKS_BETWEEN != 1:
            return
        try:
            router = self._reports.addresses(now_s)[0]
            golden.drift = await self._measure_drift(router, (head.current, canary))
        except MoesaicError as error:
            log.warning("golden prompts not measured", extra={"fields": {"reason": error.message}})
