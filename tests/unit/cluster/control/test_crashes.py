"""A controller that is killed at any step of a change comes back with exactly one valid epoch: the old one or the new one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.played_base import base_model, write_played_bundle
from support.rollout_world import Crash, PlayedWorker, World

from cluster.control import bundle_store, epoch_store, forgetting, reconciler
from cluster.control.change_order import ChangeOrder
from cluster.control.epoch_store import EpochStore
from cluster.control.head import Head
from cluster.control.progress import Progress
from moesaic.bundles import Bundle
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import Aborted

BASE = base_model()
# From which step on the new epoch is what a restart finds.
AFTER_THE_COMMIT = {"store.committed", "rollout.committed", "rollout.unload", "rollout.unloaded"}


@pytest.fixture(scope="module")
def legal(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_played_bundle(tmp_path_factory.mktemp("made") / "legal", BASE, "legal", [(0, 0), (1, 2)])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    home = frozenset(BASE.model.addresses)
    world = World(tmp_path / "state", BASE, [PlayedWorker(name, name, home, 20) for name in ("w0", "w1")])
    world.pass_time(6.0)
    yield world
    world.close()


@pytest.mark.parametrize("step", [*epoch_store.FAILPOINTS, *reconciler.FAILPOINTS])
def test_a_crash_during_a_change_leaves_the_old_epoch_or_the_new_one(
    world: World, legal: Bundle, step: str
) -> None:
    old = world.plane.store.head
    assert old is not None
    world.upload(legal)
    world.armed = step
    world.begin(ChangeOrder("swap", legal.digest))
    world.pass_time(30.0)
    assert world.num_planes == 2, "it was not killed"
    head = world.plane.store.head
    assert head is not None
    if step in AFTER_THE_COMMIT:
        assert head.previous == old.current
    else:
        assert head == old
    world.pass_time(45.0)
    current = world.plane.epochs.current
    assert current is not None and current.id == head.current
    assert all(worker.held == current.expert_versions for worker in world.workers.values())
    assert all(router.in_use == {head.current} for router in world.routers)


@pytest.mark.parametrize("step", bundle_store.FAILPOINTS)
def test_a_crash_during_an_upload_leaves_all_of_the_bundle_or_nothing(
    world: World, legal: Bundle, step: str
) -> None:
    world.armed = step
    with pytest.raises(Crash):
        world.upload(legal)
    world.pass_time(1.0)
    stored = world.plane.bundles.digests()
    assert stored == ([legal.digest] if step == "bundle.stored" else [])
    assert {path.name for path in (world.config.state / "bundles").iterdir()} == {one.hex() for one in stored}
    world.upload(legal)
    assert world.plane.bundles.digests() == [legal.digest]


@pytest.mark.parametrize("step", forgetting.FAILPOINTS)
def test_a_crash_while_a_bundle_is_forgotten_leaves_all_of_it_or_nothing(
    world: World, legal: Bundle, step: str
) -> None:
    world.upload(legal)
    world.armed = step
    with pytest.raises(Crash):
        world.forget(legal)
    world.pass_time(0.0)
    assert world.num_planes == 2, "it was not killed"
    stored = world.plane.bundles.digests()
    assert stored == ([] if step == "forget.withdrawn" else [legal.digest])
    assert {path.name for path in (world.config.state / "bundles").iterdir()} == {one.hex() for one in stored}
    assert world.plane.store.history(1)[0].what == "forget"
    world.pass_time(6.0)
    world.upload(legal)
    world.change(ChangeOrder("swap", legal.digest))


_KILLED = """
import os, sys
from pathlib import Path
from cluster.control.epoch_store import Decision, EpochStore
from cluster.control.head import Head
from moesaic.epoch import Epoch, ExpertAddress

def epoch(salt):
    return Epoch.of("tiny", {ExpertAddress(0, 0): bytes([salt]) * 32})

def die(step):
    if step == sys.argv[2] and armed:
        os._exit(9)

armed = False
store = EpochStore(Path(sys.argv[1]), model="tiny", base=b"", failpoints=die)
store.commit(None, Head(epoch(1).id), Decision("first", epoch(1).id), epoch(1))
armed = True
store.commit(Head(epoch(1).id), Head(epoch(2).id, epoch(1).id), Decision("swap", epoch(2).id), epoch(2))
"""


@pytest.mark.parametrize("step", epoch_store.FAILPOINTS)
def test_a_process_that_is_gone_in_the_middle_of_a_commit_leaves_one_head(tmp_path: Path, step: str) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), step], timeout=60, check=False)
    assert killed.returncode == 9
    store = EpochStore(tmp_path, model="tiny", base=b"")
    head, history = store.head, [one.what for one in store.history()]
    assert head is not None
    committed = step == "store.committed"
    assert history == (["swap", "first"] if committed else ["first"])
    assert store.epoch(head.current).versions[ExpertAddress(0, 0)] == bytes([2 if committed else 1]) * 32
    assert (head.previous != "") == committed
    store.close()


def test_versions_that_a_crashed_change_left_are_given_up(world: World, legal: Bundle) -> None:
    world.upload(legal)
    world.armed = "rollout.probed"
    world.begin(ChangeOrder("swap", legal.digest))
    world.pass_time(1.0)
    left = {
        ExpertVersion(ExpertAddress(one.layer, one.slot or 0), bytes.fromhex(one.version))
        for one in legal.manifest.experts
    }
    assert left & world.workers["w0"].held
    world.pass_time(20.0)
    assert not left & (world.workers["w0"].held | world.workers["w1"].held)


def test_a_worker_that_never_gives_up_what_it_was_told_to_is_told_only_now_and_then(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_s: list[float] = []

    async def unload(address: str, versions: object) -> None:
        told_s.append(world.loop.time())

    monkeypatch.setattr(world, "unload", unload)
    world.workers["w0"].hold(world.workers["w0"].held | {ExpertVersion(ExpertAddress(0, 1), bytes(32))})
    world.pass_time(20.0)
    assert 2 <= len(told_s) <= 20.0 / reconciler.REST_S


def test_an_epoch_may_end_while_a_worker_has_yet_to_answer_that_it_gave_another_one_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, unload = world.routers[0], world.unload

    async def answer_late(address: str, versions: Sequence[ExpertVersion]) -> None:
        await unload(address, versions)
        await asyncio.sleep(1.0)  # what the worker says of its contents comes before its answer

    for name in ("first", "second"):
        assert world.plane.epochs.current is not None
        router.pinned.append(world.plane.epochs.current.id)
        bundle = write_played_bundle(tmp_path / name, BASE, name, [(0, 0)])
        world.upload(bundle)
        world.change(ChangeOrder("swap", bundle.digest))
    world.pass_time(5.0)
    monkeypatch.setattr(world, "unload", answer_late)
    while router.pinned:
        router.pinned.pop()
        world.plane.hear(router.report())
        world.pass_time(0.5)
    world.pass_time(20.0)
    current = world.plane.epochs.current
    assert current is not None
    assert all(worker.held == current.expert_versions for worker in world.workers.values())
    assert not any(task.done() for task in world.tasks)


def test_whoever_follows_a_change_is_told_when_the_controller_stops(world: World, legal: Bundle) -> None:
    world.upload(legal)
    progress = world.begin(ChangeOrder("swap", legal.digest))
    world.pass_time(0.1)
    world.run(world.plane.changes.stop())
    with pytest.raises(Aborted, match="whole or not at all"):
        world.run(_follow(progress))


async def _follow(progress: Progress) -> None:
    async for _ in progress.follow():
        pass


def test_a_restarted_controller_keeps_an_old_epoch_in_which_sequences_still_run(
    world: World, legal: Bundle
) -> None:
    old = world.plane.epochs.current
    assert old is not None
    world.routers[0].pinned.append(old.id)
    world.upload(legal)
    world.change(ChangeOrder("swap", legal.digest))
    world.stop()
    world.start()
    world.pass_time(8.0)
    held = world.workers["w0"].held | world.workers["w1"].held
    assert old.expert_versions <= held
    world.routers[0].pinned.clear()
    world.pass_time(10.0)
    assert not old.expert_versions <= world.workers["w0"].held | world.workers["w1"].held


def test_a_restarted_worker_is_loaded_again_with_what_the_epoch_needs(world: World, legal: Bundle) -> None:
    world.upload(legal)
    world.change(ChangeOrder("swap", legal.digest))
    world.pass_time(20.0)
    world.workers["w0"].start()
    world.pass_time(20.0)
    current = world.plane.epochs.current
    assert current is not None
    assert world.workers["w0"].held == current.expert_versions
    assert isinstance(world.plane.store.head, Head)
