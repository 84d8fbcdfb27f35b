"""A canary is rolled back by itself, with the figure in the history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.played_base import base_model, write_played_bundle
from support.rollout_world import PlayedWorker, World

from cluster.control.canary_watch import CanaryWatch
from cluster.control.change_order import ChangeOrder, Shares
from moesaic.errors import Unavailable
from moesaic.settings import RolloutSettings

BASE = base_model()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """With an epoch on trial that every router has."""
    home = frozenset(BASE.model.addresses)
    world = World(tmp_path / "state", BASE, [PlayedWorker("w0", "a", home, 20)])
    world.pass_time(6.0)
    legal = write_played_bundle(tmp_path / "legal", BASE, "legal", [(0, 0)])
    world.upload(legal)
    world.change(ChangeOrder("swap", legal.digest, canary=Shares(0.1, 0.0)))
    world.pass_time(2.0)
    yield world
    world.close()


def watch(world: World, drifts: list[float | None], asked: list[tuple[str, str]]) -> CanaryWatch:
    """The golden prompts drift by each of these in turn; None: they cannot be measured."""

    async def measure(router: str, epochs: tuple[str, str]) -> float:
        asked.append(epochs)
        if (drift := drifts.pop(0)) is None:
            raise Unavailable("it does not answer")
        return drift

    plane = world.plane
    return CanaryWatch(
        plane.epochs, plane.reports, plane.changes, RolloutSettings(), measure, clock=world.loop.time
    )


def test_golden_prompts_that_drift_roll_it_back(world: World) -> None:
    head, asked = world.plane.store.head, list[tuple[str, str]]()
    assert head is not None and head.canary is not None
    looking = watch(world, [0.75], asked)
    world.run(looking.look())
    world.pass_time(1.0)
    assert asked == [(head.current, head.canary.epoch)]
    assert world.plane.store.head == head.end_trial()
    decision = world.plane.store.history(1)[0]
    assert (decision.what, decision.operator) == ("rollback", "controller")
    assert decision.detail == "golden prompts drift by 0.75 nats a token, the limit is 0.5"


def test_golden_prompts_are_measured_once_and_tried_again_after_a_while_when_that_fails(world: World) -> None:
    asked = list[tuple[str, str]]()
    looking = watch(world, [None, 0.1], asked)
    for _ in range(12):
        world.run(looking.look())
    assert len(asked) == 2
    assert world.plane.epochs.canary is not None
    verdict = looking.verdict()
    assert verdict is not None and verdict.detail.endswith("golden prompts drift by 0.1 nats a token")
