"""Changes of experts one after another, each with a fault in its middle, and what the model was after each.

Every epoch that a change can make is first asked all prompts alone, so that each answer under faults is compared with
the reference of the epoch that it names.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random

from cluster.drill.expert_control import ExpertControl
from cluster.drill.experts import ROUND, Change, Experts, Outcome, outcome_of, possible_changes, way_back
from cluster.drill.faults import Fault, Injection, Stage
from cluster.drill.injector import Strike
from cluster.drill.living import Living
from cluster.drill.load import ask_alone
from cluster.drill.rig import Rig
from moesaic.errors import MoesaicError

CHANGE_TIMEOUT_S = 60.0
_STAGES = list(Stage)


class Changing:
    """Changes the experts of one cluster. `outcomes`: what came of the changes with a fault in their middle."""

    def __init__(self, rig: Rig, control: ExpertControl) -> None:
        self.rig = rig
        self.outcomes: Counter[Outcome] = Counter()
        self._control = control
        self._random = Random(f"{rig.plan.seed} changes")
        self._experts: Experts | None = Experts()

    async def inject(self, injection: Injection, living: Living) -> Strike:
        """Begins the next change, and injects as soon as that has come to the injection's stage, or has ended. An injection
        without a stage comes between two changes."""
        before = self._experts
        # After an outcome that must not be, nobody knows which change is possible.
        if injection.stage is None or before is None:
            return await self.rig.injector.inject(injection, living)
        change = self._random.choice(possible_changes(before))
        reached = asyncio.Event()
        changing = asyncio.create_task(self._change(change, injection.stage, reached))
        try:
            await reached.wait()
            strike = await self.rig.injector.inject(replace(injection, change=change.title), living)
            await changing
        finally:
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
        self._experts = await self._control.look()
        outcome = outcome_of(change, before, self._experts)
        self.outcomes[outcome] += 1
        self.rig.say(f"{Fault.SWAP}: {change.title}: {outcome}")
        return strike

    async def _change(self, change: Change, stage: Stage | None, reached: asyncio.Event) -> None:
        """Returns when every router has it, or when it has failed: the controller's history tells what it left."""

        def reach(now: Stage) -> None:
            if stage is None or _STAGES.index(now) >= _STAGES.index(stage):
                reached.set()

        try:
            async with asyncio.timeout(CHANGE_TIMEOUT_S):
                await self._control.carry_out(change, reach)
        except (MoesaicError, TimeoutError) as error:
            self.rig.say(f"{Fault.SWAP}: {change.title}: {error or 'no end of it'}")
        finally:
            reached.set()


@contextlib.asynccontextmanager
async def changing_experts(rig: Rig) -> AsyncIterator[Changing]:
    """A rig with the references of all epochs. In the end the cluster has the model that it had.

    Raises FailedPrecondition where the experts cannot be changed.
    """
    control = ExpertControl(rig.site.grpc)
    await control.prepare()
    try:
        yield Changing(await _with_references(rig, control), control)
    finally:
        if not rig.site.has_ended:
            with contextlib.suppress(MoesaicError, TimeoutError):
                async with asyncio.timeout(CHANGE_TIMEOUT_S):
                    await _go_back(control)


async def _with_references(rig: Rig, control: ExpertControl) -> Rig:
    """Makes every model once, at rest."""
    references = dict(rig.references)
    for change in ROUND:
        rig.say(f"{Fault.SWAP}: {change.title}, for the reference")
        await control.learn(change)
        if change.after != Experts():
            references |= await ask_alone(rig.api.send, rig.requests, rig.clock)
    return replace(rig, references=references)


async def _go_back(control: ExpertControl) -> None:
    while (now := await control.look()) is not None and (change := way_back(now)) is not None:
        await control.carry_out(change)
