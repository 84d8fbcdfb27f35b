"""How far a change is, for whoever follows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from cluster.control.pulse import Pulse
from moesaic.errors import MoesaicError
from moesaic.v1 import control_pb2


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of a change: one sentence, how much of it is done, and from the commit on the epochs."""

    stage: control_pb2.ChangeStage
    detail: str
    done: int = 0
    total: int = 0
    epoch: str = ""
    previous_epoch: str = ""

    def to_proto(self) -> control_pb2.ChangeResponse:
        return control_pb2.ChangeResponse(
            stage=self.stage,
            detail=self.detail,
            done=self.done,
            total=self.total,
            epoch=self.epoch,
            previous_epoch=self.previous_epoch,
        )


class Progress:
    """The steps of one change. Of each stage the newest step is kept, so that there are never many."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._pulse = Pulse()
        self._ended = False
        self._error: MoesaicError | None = None

    def tell(self, step: Step) -> None:
        if self._steps and self._steps[-1].stage == step.stage:
            self._steps[-1] = step
        else:
            self._steps.append(step)
        self._pulse.beat()

    def end(self, error: MoesaicError | None = None) -> None:
        self._ended, self._error = True, error
        self._pulse.beat()

    @property
    def last(self) -> Step | None:
        return self._steps[-1] if self._steps else None

    async def follow(self) -> AsyncIterator[Step]:
        """Every stage so far and to come; raises the error that ended the change."""
        index, sent = 0, None
        while True:
            while index < len(self._steps):
                step = self._steps[index]
                if index < len(self._steps) - 1:
                    index += 1
                elif step is sent:
                    break
                if step is not sent:
                    sent = step
                    yield step
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            await self._pulse.wait()
