"""Whoever follows a change sees every stage, also when they come late."""

from __future__ import annotations

import asyncio

import pytest

from cluster.control.progress import Progress, Step
from moesaic.errors import Aborted
from moesaic.v1 import control_pb2 as pb


async def test_late_followers_see_the_newest_step_of_each_stage() -> None:
    progress = Progress()
    progress.tell(Step(pb.CHANGE_STAGE_VERIFY, "v"))
    for done in range(3):
        progress.tell(Step(pb.CHANGE_STAGE_LOAD, "l", done, 3))
    early = asyncio.create_task(_all(progress))
    await asyncio.sleep(0)
    progress.tell(Step(pb.CHANGE_STAGE_LOAD, "l", 3, 3))
    progress.tell(Step(pb.CHANGE_STAGE_DONE, "d"))
    progress.end()
    assert [(step.detail, step.done) for step in await early] == [("v", 0), ("l", 2), ("l", 3), ("d", 0)]
    assert [(step.detail, step.done) for step in await _all(progress)] == [("v", 0), ("l", 3), ("d", 0)]


async def test_a_refusal_reaches_every_follower() -> None:
    progress = Progress()
    progress.end(Aborted("another was faster"))
    for _ in range(2):
        with pytest.raises(Aborted):
            await _all(progress)


async def _all(progress: Progress) -> list[Step]:
    return [step async for step in progress.follow()]
