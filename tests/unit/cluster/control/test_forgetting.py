"""Which stored bundles can be forgotten, and what comes of the epochs that had them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.played_base import base_model, write_played_bundle
from support.rollout_world import PlayedWorker, World

from cluster.control.bundle_needs import bundle_needs
from cluster.control.change_order import ChangeOrder, Shares
from moesaic.bundles import Bundle
from moesaic.errors import Aborted, FailedPrecondition, NotFound, Unavailable

BASE = base_model()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("made")
    targets = {"legal": [(0, 0)], "legal-2": [(0, 0)], "fifth": [(0, 1)]}
    return {name: write_played_bundle(folder / name, BASE, name, where) for name, where in targets.items()}


@pytest.fixture
def world(tmp_path: Path, made: dict[str, Bundle]) -> Iterator[World]:
    """Every bundle is stored, and the model is the folder's."""
    home = frozenset(BASE.model.addresses)
    world = World(tmp_path / "state", BASE, [PlayedWorker("w0", "a", home, 20)])
    world.pass_time(6.0)
    for bundle in made.values():
        world.upload(bundle)
    yield world
    world.close()


def swap(world: World, bundle: Bundle, canary: Shares | None = None) -> str:
    """The epoch that comes of it."""
    world.change(ChangeOrder("swap", bundle.digest, canary=canary))
    world.pass_time(20.0)
    epoch = world.plane.epochs.canary if canary else world.plane.epochs.current
    assert epoch is not None
    return epoch.id


def refusal(world: World, bundle: Bundle) -> str:
    """Nothing changes."""
    before = world.plane.store.history()
    with pytest.raises(FailedPrecondition) as refused:
        world.forget(bundle)
    assert (refused.value.field, refused.value.reason) == ("bundle", "BUNDLE_NEEDED")
    assert bundle.digest in world.plane.bundles.digests()
    assert world.plane.store.history() == before
    return refused.value.message


def test_a_bundle_that_no_epoch_needs_is_gone_and_the_history_says_who_wanted_it(
    world: World, made: dict[str, Bundle]
) -> None:
    fifth = made["fifth"]
    world.forget(fifth)
    assert fifth.digest not in world.plane.bundles.digests()
    assert {path.name for path in (world.config.state / "bundles").iterdir()} == {
        made[name].digest.hex() for name in ("legal", "legal-2")
    }
    last = world.plane.store.history(1)[0]
    assert (last.what, last.bundle, last.operator) == ("forget", "fifth", "ann")
    assert last.detail.startswith(f"digest {fifth.digest.hex()[:12]}, ")
    with pytest.raises(NotFound):
        world.forget(fifth)
    world.upload(fifth)
    swap(world, fifth)


def test_what_is_current_on_trial_or_the_way_back_is_kept(world: World, made: dict[str, Bundle]) -> None:
    first = swap(world, made["legal"])
    trial = swap(world, made["legal-2"], Shares(0.5, 0.0))
    assert refusal(world, made["legal"]) == (f"bundle: legal is needed for epoch {first}, which is current")
    assert refusal(world, made["legal-2"]) == (
        f"bundle: legal-2 is needed for epoch {trial}, which is on trial"
    )
    world.change(ChangeOrder("promote"))
    world.pass_time(20.0)
    assert refusal(world, made["legal"]) == (
        f"bundle: legal is needed for epoch {first}, to which a rollback goes back"
    )
    assert {digest: need.epoch for digest, need in bundle_needs(world.plane.epochs).items()} == {
        made["legal"].digest: first,
        made["legal-2"].digest: trial,
    }


def test_what_sequences_still_run_in_is_kept_until_they_end(world: World, made: dict[str, Bundle]) -> None:
    old = swap(world, made["legal"])
    world.routers[0].pinned.append(old)
    for name in ("legal-2", "fifth"):
        world.change(ChangeOrder("swap", made[name].digest))
    world.pass_time(2.0)
    assert refusal(world, made["legal"]).endswith(f"epoch {old}, in which sequences still run")
    world.routers[0].pinned.clear()
    world.pass_time(5.0)
    world.forget(made["legal"])


def test_a_rollback_to_an_epoch_whose_bundle_was_forgotten_is_refused_until_it_is_back(
    world: World, made: dict[str, Bundle]
) -> None:
    old = swap(world, made["legal"])
    for name in ("legal-2", "fifth"):
        last = swap(world, made[name])
    world.forget(made["legal"])
    with pytest.raises(FailedPrecondition) as refused:
        world.change(ChangeOrder("rollback", epoch=old))
    assert (refused.value.field, refused.value.reason) == ("epoch", "BUNDLE_FORGOTTEN")
    assert refused.value.message == (
        f"epoch: {old} needs the bundle legal, which was forgotten: bring it again from its folder"
    )
    assert [one.what for one in world.plane.store.history(2)] == ["refused", "forget"]
    assert world.plane.epochs.current is not None and world.plane.epochs.current.id == last
    world.upload(made["legal"])
    world.change(ChangeOrder("rollback", epoch=old))


def test_nothing_is_forgotten_while_a_change_runs(world: World, made: dict[str, Bundle]) -> None:
    world.begin(ChangeOrder("swap", made["legal"].digest))
    with pytest.raises(Aborted, match="a change runs"):
        world.forget(made["fifth"])


def test_a_restarted_controller_first_hears_what_routers_need(world: World, made: dict[str, Bundle]) -> None:
    world.stop()
    world.start()
    world.pass_time(1.0)
    with pytest.raises(Unavailable, match="has just started"):
        world.forget(made["fifth"])
    world.pass_time(6.0)
    world.forget(made["fifth"])
