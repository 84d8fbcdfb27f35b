"""What a drill asks of a controller, over real gRPC."""

from __future__ import annotations

import asyncio

import pytest
from support.played_controller import PlayedLifecycle, playing_lifecycle

from cluster.bundles.demo_bundles import BETTER, FIRST
from cluster.drill.expert_control import TRIAL_SHARE, ExpertControl
from cluster.drill.experts import ROUND, Bundle, Change, Experts, Verb
from cluster.drill.faults import Stage
from moesaic.errors import FailedPrecondition, Unavailable
from moesaic.v1 import control_pb2

BASE, FIRST_EPOCH = "1111111111111111", "2222222222222222"
ADD, SWAP = ROUND[0], ROUND[1]


def controller() -> PlayedLifecycle:
    """At rest. Every change of it makes FIRST_EPOCH."""
    return PlayedLifecycle(BASE, history=control_pb2.GetHistoryResponse(epoch=BASE))


async def test_every_change_is_asked_for_in_the_controllers_words() -> None:
    played = controller()
    async with playing_lifecycle(played) as (router, _):
        control = ExpertControl(router)
        await control.prepare()
        await control.learn(ADD)
        for change in (
            SWAP,
            Change(Verb.CANARY, Bundle.FIRST, Experts(Bundle.NONE, Bundle.FIRST)),
            Change(Verb.CANARY, Bundle.BETTER, Experts(Bundle.FIRST, Bundle.BETTER)),
            Change(Verb.ROLLBACK, Bundle.FIRST, Experts(Bundle.FIRST)),
            Change(Verb.REMOVE, Bundle.BETTER, Experts()),
        ):
            await control.carry_out(change)
    digests = {bundle.name: bundle.digest for bundle in played.bundles.values()}
    add, swap, try_first, try_better, rollback, remove = played.changes
    assert set(digests) == {FIRST, BETTER}
    assert (add.kind, add.bundle) == (control_pb2.CHANGE_KIND_ADD, digests[FIRST])
    assert (swap.kind, swap.bundle) == (control_pb2.CHANGE_KIND_SWAP, digests[BETTER])
    assert (try_first.kind, try_first.canary, try_first.share) == (add.kind, True, TRIAL_SHARE)
    assert (try_better.kind, try_better.bundle) == (swap.kind, digests[BETTER])
    assert (rollback.kind, rollback.epoch) == (control_pb2.CHANGE_KIND_ROLLBACK, FIRST_EPOCH)
    assert (remove.kind, remove.name) == (control_pb2.CHANGE_KIND_REMOVE, BETTER)


async def test_it_is_told_how_far_a_change_is() -> None:
    stages: list[Stage] = []
    async with playing_lifecycle(controller()) as (router, _):
        control = ExpertControl(router)
        await control.prepare()
        await control.carry_out(ADD, stages.append)
    assert stages == list(Stage)


async def test_an_epoch_that_no_change_was_to_make_is_told_from_those_that_are_known() -> None:
    played = controller()
    async with playing_lifecycle(played) as (router, _):
        control = ExpertControl(router)
        await control.prepare()
        await control.learn(ADD)
        seen = [await control.look()]
        for epoch, canary in ((BASE, FIRST_EPOCH), (FIRST_EPOCH, ""), ("3333", ""), (BASE, "3333")):
            played.history = control_pb2.GetHistoryResponse(epoch=epoch, canary=canary)
            seen.append(await control.look())
    trial = Experts(Bundle.NONE, Bundle.FIRST)
    assert seen == [Experts(), trial, Experts(Bundle.FIRST), None, None]


async def test_two_models_of_one_epoch_are_an_error() -> None:
    async with playing_lifecycle(controller()) as (router, _):
        control = ExpertControl(router)
        await control.prepare()
        await control.learn(ADD)
        with pytest.raises(Unavailable, match="is two models"):
            await control.learn(SWAP)


async def test_a_cluster_with_an_epoch_on_trial_is_left_alone() -> None:
    played = controller()
    played.history.canary = FIRST_EPOCH
    async with playing_lifecycle(played) as (router, _):
        with pytest.raises(FailedPrecondition, match="fault: swap cannot begin"):
            await ExpertControl(router).prepare()
    assert played.uploads == 0


async def test_a_controller_that_never_comes_back_says_nothing() -> None:
    async def sleep(_: float) -> None:
        await asyncio.sleep(0)

    assert await ExpertControl("127.0.0.1:1", sleep).look() is None
