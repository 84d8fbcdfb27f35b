"""A fault hits in the middle of a change, and what the change left is asked once the cluster is whole again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

from cluster.drill.changing import Changing
from cluster.drill.expert_control import ExpertControl
from cluster.drill.experts import Change, Experts, Outcome
from cluster.drill.faults import Act, Injection, Stage, Targets
from cluster.drill.injector import Strike
from cluster.drill.living import Living
from cluster.drill.rig import Rig
from moesaic.errors import Unavailable

LIVING = Living({}, Targets({}))
IN_PUBLISH = Injection(1.0, Act.KILL, ("w0",), stage=Stage.PUBLISH)


class World:
    """Plays the controller and the injector, and keeps in which order what happens."""

    def __init__(self, *, breaks_at: Stage | None = None) -> None:
        self.happened: list[str] = []
        self.experts: Experts | None = Experts()
        self._breaks_at = breaks_at

    async def carry_out(self, change: Change, reach: Callable[[Stage], None]) -> None:
        for stage in Stage:
            if stage is self._breaks_at:
                raise Unavailable("the controller is gone")
            self.happened.append(stage)
            reach(stage)
            await self._turn()
        self.experts = change.after

    async def inject(self, injection: Injection, living: Living) -> Strike:
        self.happened.append(injection.title)
        return Strike(injection, 1.0, 1.0, 2.0)

    async def look(self) -> Experts | None:
        return self.experts

    async def _turn(self) -> None:
        """Lets the others run until they wait."""
        for _ in range(5):
            await asyncio.sleep(0)


def changing(world: World) -> Changing:
    rig = SimpleNamespace(plan=SimpleNamespace(seed=1), injector=world, say=lambda line: None)
    return Changing(cast(Rig, rig), cast(ExpertControl, world))


async def test_the_fault_hits_as_soon_as_the_change_has_come_to_its_stage() -> None:
    world = World()
    drill = changing(world)
    strike = await drill.inject(IN_PUBLISH, LIVING)
    assert world.experts is not None
    assert strike.injection.title.startswith("kill w0 in publish of ")
    place = world.happened.index(strike.injection.title)
    assert world.happened[place - 1] == Stage.PUBLISH
    assert world.happened[place + 1] == Stage.COMMIT
    assert drill.outcomes == {Outcome.COMMITTED: 1}


async def test_a_change_that_fails_before_its_stage_is_hit_all_the_same_and_leaves_the_old_epoch() -> None:
    world = World(breaks_at=Stage.LOAD)
    drill = changing(world)
    await drill.inject(IN_PUBLISH, LIVING)
    assert len(world.happened) == 2
    assert drill.outcomes == {Outcome.LEFT: 1}


async def test_after_an_epoch_that_nobody_made_nothing_is_changed_any_more() -> None:
    world = World(breaks_at=Stage.COMMIT)
    drill = changing(world)
    world.experts = None
    await drill.inject(IN_PUBLISH, LIVING)
    world.happened.clear()
    await drill.inject(IN_PUBLISH, LIVING)
    assert world.happened == ["kill w0 in publish of a change"]
    assert drill.outcomes == {Outcome.TORN: 1}
