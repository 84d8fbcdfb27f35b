"""Changes of the model by a controller, over gRPC, with workers and routers that only play their part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.v1 import control_pb2

pytestmark = pytest.mark.timeout(300)

SWAP, ADD, REMOVE, PROMOTE, ROLLBACK = (
    control_pb2.CHANGE_KIND_SWAP,
    control_pb2.CHANGE_KIND_ADD,
    control_pb2.CHANGE_KIND_REMOVE,
    control_pb2.CHANGE_KIND_PROMOTE,
    control_pb2.CHANGE_KIND_ROLLBACK,
)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def stages(steps: list[control_pb2.ChangeResponse]) -> list[str]:
    names = [control_pb2.ChangeStage.Name(step.stage) for step in steps]
    return list(dict.fromkeys(name.removeprefix("CHANGE_STAGE_") for name in names))


def versions(bundle: Any) -> set[bytes]:
    return {bytes.fromhex(expert.version) for expert in bundle.manifest.experts}


async def test_a_swap_goes_through_its_stages_and_ends_with_the_old_versions_given_up(rig, bundle) -> None:
    legal = bundle("legal", [(0, 3), (1, 3)])
    async with rig.running():
        await until(lambda: rig.router.epoch)
        first = rig.router.epoch
        steps = await rig.swap(legal, operator="ann")
        assert stages(steps) == [
            "VERIFY",
            "LOAD",
            "PROBE",
            "PUBLISH",
            "COMMIT",
            "SPREAD",
            "DRAIN",
            "UNLOAD",
            "DONE",
        ]
        assert (steps[-1].previous_epoch, steps[-1].epoch) == (first.id, rig.router.epoch.id)
        await until(lambda: all(len(worker.held) == 8 for worker in rig.workers))
        assert versions(legal) <= {version.digest for version in rig.workers[0].held}
        assert [entry.what for entry in (await rig.history()).entries] == ["swap", "first"]
        assert rig.router.impossible == []


async def test_new_slots_are_added_with_their_rows_and_removed(rig, bundle) -> None:
    maths = bundle("maths-v1", [(0, None), (1, None)], tags=["maths"])
    async with rig.running():
        await until(lambda: rig.router.epoch)
        first = rig.router.epoch
        await rig.add(maths)
        added = rig.router.epoch
        assert set(added.gate_rows) == {ExpertAddress(0, 4), ExpertAddress(1, 4)}
        assert all(len(worker.held) == 10 for worker in rig.workers)
        await rig.change(kind=REMOVE, name="maths-v1")
        assert rig.router.epoch == first
        await until(lambda: all(len(worker.held) == 8 for worker in rig.workers))


async def test_rollback_goes_back_to_the_epoch_before(rig, bundle) -> None:
    async with rig.running():
        await until(lambda: rig.router.epoch)
        first = rig.router.epoch
        await rig.swap(bundle("legal", [(0, 3)]))
        await rig.change(kind=ROLLBACK)
        assert rig.router.epoch == first
        assert {entry.what for entry in (await rig.history()).entries} == {"first", "swap", "rollback"}


async def test_a_canary_is_told_to_routers_and_promoted(rig, bundle) -> None:
    async with rig.running():
        await until(lambda: rig.router.epoch)
        first = rig.router.epoch
        steps = await rig.swap(bundle("legal", [(0, 3)]), canary=True, share=0.1, shadow_share=0.05)
        assert stages(steps)[-2:] == ["SPREAD", "DONE"]
        assert rig.router.epoch == first
        assert (rig.router.canary.share, rig.router.canary.shadow_share) == (0.1, 0.05)
        canary = rig.router.canary.epoch.id
        (listed,) = (await rig.stub.ListBundles(control_pb2.ListBundlesRequest())).bundles
        assert not listed.experts
        assert [(it.layer, it.slot) for it in listed.canary_experts] == [(0, 3)]
        await rig.change(kind=PROMOTE)
        assert (rig.router.epoch.id, rig.router.canary) == (canary, None)


async def test_a_canary_whose_values_are_not_finite_is_rolled_back_by_itself(rig, bundle) -> None:
    async with rig.running():
        await until(lambda: rig.router.epoch)
        await rig.swap(bundle("legal", [(0, 3)]), canary=True, share=0.1)
        canary = rig.router.canary.epoch.id
        rig.router.stats[canary] = control_pb2.EpochStats(epoch=canary, failed=1, not_finite=1)
        await until(lambda: rig.router.canary is None)
        last = (await rig.history()).entries[0]
        assert (last.what, last.operator) == ("rollback", "controller")
        assert last.detail == "1 sequences had values that are not finite"


async def test_a_bundle_that_no_epoch_needs_is_forgotten_and_one_that_is_needed_is_not(rig, bundle) -> None:
    legal, law = bundle("legal", [(0, 3)]), bundle("law", [(0, 3)], seed=2)
    async with rig.running():
        await until(lambda: rig.router.epoch)
        await rig.upload(law)
        await rig.swap(legal)
        listed = (await rig.stub.ListBundles(control_pb2.ListBundlesRequest())).bundles
        assert {one.name: one.needed_by for one in listed} == {"legal": rig.router.epoch.id, "law": ""}
        forgotten = await rig.stub.ForgetBundle(
            control_pb2.ForgetBundleRequest(digest=law.digest, operator="ann")
        )
        assert (forgotten.name, forgotten.num_bytes) == ("law", law.num_bytes)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rig.stub.ForgetBundle(control_pb2.ForgetBundleRequest(digest=legal.digest))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "legal is needed for epoch" in refused.value.details()
        listed = (await rig.stub.ListBundles(control_pb2.ListBundlesRequest())).bundles
        assert [one.name for one in listed] == ["legal"]
        newest = (await rig.history()).entries[0]
        assert (newest.what, newest.bundle, newest.operator) == ("forget", "law", "ann")


async def test_the_whole_cluster_comes_back_in_the_last_committed_epoch(rig, bundle) -> None:
    async with rig.running():
        await until(lambda: rig.router.epoch)
        await rig.swap(bundle("legal", [(0, 3)]))
        await rig.add(bundle("maths", [(1, None)], seed=2))
        last = rig.router.epoch
    for worker in rig.workers:
        worker.held = {version for version in worker.held if version.address.slot != 3}
        worker.held |= {ExpertVersion(a, b) for a, b in _folder(worker) if a.slot == 3}
        worker.held = {version for version in worker.held if version.address.slot < 4}
        worker.revision += 1
    async with rig.running():
        await until(lambda: rig.router.epoch)
        assert rig.router.epoch == last
        assert rig.router.impossible == []
        await until(lambda: all(len(worker.held) == 9 for worker in rig.workers))


def _folder(worker: Any) -> set[ExpertVersion]:
    from support.played_workers import folder_version

    return set(map(folder_version, worker.home))


async def test_a_second_operator_is_told_who_is_at_it_and_which_epoch_is_current(rig, bundle) -> None:
    async with rig.running():
        await until(lambda: rig.router.epoch)
        first = rig.router.epoch.id
        for worker in rig.workers:
            worker.may_load.clear()
        one, other = bundle("legal", [(0, 3)]), bundle("other", [(0, 2)], seed=2)
        await rig.upload(other)
        begun = asyncio.create_task(rig.swap(one, operator="ann"))
        await until(lambda: rig.workers[0].loads)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rig.change(kind=SWAP, bundle=other.digest, operator="bob")
        assert refused.value.code() is grpc.StatusCode.ABORTED
        assert "ann began a swap" in refused.value.details() and first in refused.value.details()
        for worker in rig.workers:
            worker.may_load.set()
        await begun
        with pytest.raises(grpc.aio.AioRpcError) as stale:
            await rig.change(kind=SWAP, bundle=other.digest, expected_epoch=first)
        assert stale.value.code() is grpc.StatusCode.ABORTED
        assert rig.router.epoch.id in stale.value.details()


async def test_a_change_goes_on_when_its_caller_leaves(rig, bundle) -> None:
    legal = bundle("legal", [(0, 3)])
    async with rig.running():
        await until(lambda: rig.router.epoch)
        first = rig.router.epoch
        for worker in rig.workers:
            worker.may_load.clear()
        await rig.upload(legal)
        call = rig.stub.Change(control_pb2.ChangeRequest(kind=SWAP, bundle=legal.digest))
        await until(lambda: rig.workers[0].loads)
        call.cancel()
        for worker in rig.workers:
            worker.may_load.set()
        await until(lambda: rig.router.epoch != first)


async def test_wrong_answers_to_probe_vectors_refuse_the_change_and_leave_nothing_behind(rig, bundle) -> None:
    async with rig.running():
        await until(lambda: rig.router.epoch)
        first = rig.router.epoch
        rig.workers[1].wrong_probe = True
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rig.swap(bundle("legal", [(0, 3)]))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "differ by 0.5 from those expected" in refused.value.details()
        await until(lambda: all(len(worker.held) == 8 for worker in rig.workers))
        assert rig.router.epoch == first
        assert (await rig.history()).entries[0].what == "refused"
