"""Which epochs are in use, and the passages from one to the next. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moesaic.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class Trial:
    """An epoch that is tried on a share of the requests; both shares are in [0, 1]."""

    epoch: str
    share: float
    # The share of the other requests' rows that its experts compute beside, for comparison alone.
    shadow_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Head:
    """The epochs in use, by id: the current one, the one before it (empty: none), and the one on trial."""

    current: str
    previous: str = ""
    canary: Trial | None = None

    def move_to(self, epoch: str) -> Head:
        """Another epoch is current. Raises FailedPrecondition while one is on trial."""
        self._refuse_canary()
        return Head(epoch, previous=self.current)

    def begin_trial(self, trial: Trial) -> Head:
        """Raises FailedPrecondition while one is on trial."""
        self._refuse_canary()
        return replace(self, canary=trial)

    def promote(self) -> Head:
        """The epoch on trial is current. Raises FailedPrecondition without one."""
        if self.canary is None:
            raise FailedPrecondition("no epoch is on trial, so that none can be promoted", reason="NO_CANARY")
        return Head(self.canary.epoch, previous=self.current)

    def end_trial(self) -> Head:
        return replace(self, canary=None)

    @property
    def in_use(self) -> tuple[str, ...]:
        """The ids of the epochs in which new requests are computed."""
        return (self.current,) if self.canary is None else (self.current, self.canary.epoch)

    def _refuse_canary(self) -> None:
        if self.canary is not None:
            raise FailedPrecondition(
                f"epoch {self.canary.epoch} is on trial: promote it or roll it back first",
                reason="CANARY_RUNNING",
            )
