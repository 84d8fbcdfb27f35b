"""What operators ask of a controller, over real gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.bundles import make_bundle
from support.checkpoints import write_mixtral
from support.played_controller import PlayedLifecycle, PlayedRouterControl, playing_lifecycle

from cluster.bundles import controller_client as controller_client_module
from cluster.bundles.controller_client import controller_client, find_controller
from moesaic.bundles import Bundle
from moesaic.errors import Aborted, FailedPrecondition, Unavailable
from moesaic.v1 import control_pb2


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "maths-v1", write_mixtral(tmp_path / "base"))


async def test_a_router_tells_its_controller() -> None:
    async with playing_lifecycle(PlayedLifecycle()) as (router, controller):
        assert await find_controller(router) == controller


async def test_workers_named_by_hand_have_no_controller() -> None:
    router = PlayedRouterControl()
    async with playing_lifecycle(PlayedLifecycle(), router) as (address, _):
        router.control_address = ""
        with pytest.raises(FailedPrecondition, match="named by hand"):
            await find_controller(address)


async def test_a_bundle_is_sent_once(bundle: Bundle) -> None:
    controller = PlayedLifecycle()
    shown: list[tuple[int, int]] = []
    async with playing_lifecycle(controller) as (_, address), controller_client(address) as client:
        first = await client.upload(bundle, lambda done, total: shown.append((done, total)))
        second = await client.upload(bundle)
    assert (first.known, second.known, controller.uploads) == (False, True, 1)
    assert first.digest == second.digest == bundle.digest
    assert shown[-1] == (bundle.num_bytes, bundle.num_bytes)
    assert controller.bundles[bundle.digest].num_bytes == bundle.num_bytes
    assert controller.bundles[bundle.digest].manifest == bundle.manifest_bytes


async def test_a_change_that_loses_says_why() -> None:
    controller = PlayedLifecycle(error=Aborted("the epoch is 3333 now"), error_after=2)
    async with playing_lifecycle(controller) as (_, address), controller_client(address) as client:
        seen = []
        with pytest.raises(Aborted, match="3333"):
            async for step in client.change(control_pb2.ChangeRequest()):
                seen.append(step.stage)
    assert seen == [control_pb2.CHANGE_STAGE_VERIFY, control_pb2.CHANGE_STAGE_LOAD]


async def test_a_change_is_carried_out_once_every_router_has_it_and_each_step_is_shown() -> None:
    shown: list[control_pb2.ChangeStage] = []
    async with playing_lifecycle(PlayedLifecycle()) as (_, address), controller_client(address) as client:
        done = await client.carry_out(control_pb2.ChangeRequest(), lambda step: shown.append(step.stage))
    assert (done.epoch, done.previous_epoch) == ("2222222222222222", "1111111111111111")
    assert 0 < done.committed_s <= done.spread_s
    assert shown[-1] == control_pb2.CHANGE_STAGE_SPREAD


async def test_who_knows_that_every_router_has_a_change_leaves_while_old_sequences_run_on() -> None:
    controller = PlayedLifecycle(drains_for_ever=True)
    async with playing_lifecycle(controller) as (_, address), controller_client(address) as client:
        await client.carry_out(control_pb2.ChangeRequest())
        async with asyncio.timeout(30):
            await controller.left.wait()


async def test_a_controller_that_is_not_there_is_named() -> None:
    with pytest.raises(Unavailable, match=r"no controller answers at 127\.0\.0\.1:1"):
        async with controller_client("127.0.0.1:1") as client:
            await client.bundles()


async def test_a_silent_controller_is_named_before_a_change_could_wait_for_it(
    silent_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_client_module, "REACH_TIMEOUT_S", 0.1)
    with pytest.raises(Unavailable, match=f"no controller answers at {silent_address}: serving goes on"):
        async with controller_client(silent_address):
            pytest.fail("it was not reached")
