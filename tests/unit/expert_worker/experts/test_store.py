"""A worker gives the very version that was asked for, or says why not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from support.expert_calls import experts_of, versions_of

from expert_worker.experts.expert import Expert
from expert_worker.experts.store import ExpertStore, HeldExpert
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import Aborted, FailedPrecondition
from moesaic.families import MoeModel


def test_the_version_that_is_asked_for_is_given(store: ExpertStore) -> None:
    address = ExpertAddress(1, 2)
    assert store.get(address, versions_of(store)[address], field="f") is experts_of(store)[address]


@pytest.mark.parametrize("address", [ExpertAddress(0, 3), ExpertAddress(9, 0)])
def test_an_expert_of_another_worker_is_refused(store: ExpertStore, address: ExpertAddress) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        store.get(address, bytes(32), field="experts[0].version")
    assert (caught.value.reason, caught.value.field) == ("NOT_HELD", "experts[0].version")
    assert f"layer {address.layer} slot {address.slot}" in caught.value.message


@pytest.mark.parametrize("version", [b"", bytes(32), bytes(31)])
def test_another_version_is_refused_with_the_one_that_is_held(store: ExpertStore, version: bytes) -> None:
    address = ExpertAddress(0, 1)
    with pytest.raises(FailedPrecondition) as caught:
        store.get(address, version, field="experts[0].version")
    assert caught.value.reason == "WRONG_VERSION"
    assert versions_of(store)[address].hex()[:12] in caught.value.message


def test_the_weights_in_memory_are_counted(store: ExpertStore, model: MoeModel) -> None:
    assert store.weight_bytes == 6 * model.expert_bytes(0)
    assert list(versions_of(store)) == [ExpertAddress(layer, slot) for layer in range(2) for slot in range(3)]


def held(tag: int) -> HeldExpert:
    """An expert that is only looked up."""
    return HeldExpert(bytes([tag]) * 32, cast(Expert, object()))


def test_two_versions_of_a_slot_are_held_beside_each_other() -> None:
    store, address, first, second = ExpertStore(), ExpertAddress(0, 1), held(1), held(2)
    store.add(address, first)
    store.add(address, second)
    for one in (first, second):
        assert store.get(address, one.version, field="f") is one.expert
    assert list(store.experts()) == [(address, first.version), (address, second.version)]
    with pytest.raises(FailedPrecondition) as caught:
        store.get(address, bytes(32), field="f")
    assert caught.value.reason == "WRONG_VERSION"
    assert "version 010101010101 and 020202020202, the call" in caught.value.message


def test_a_version_that_is_removed_is_refused_from_then_on() -> None:
    store, address, first, second = ExpertStore(), ExpertAddress(0, 1), held(1), held(2)
    store.add(address, first)
    store.add(address, second)
    for reason, removed in (("WRONG_VERSION", first), ("NOT_HELD", second)):
        assert store.remove_all([ExpertVersion(address, removed.version)]) == [removed.expert]
        with pytest.raises(FailedPrecondition) as caught:
            store.get(address, removed.version, field="f")
        assert caught.value.reason == reason
        assert store.remove_all([ExpertVersion(address, removed.version)]) == []
    assert not store.experts()


def test_versions_that_come_together_come_in_one_moment_or_not_at_all() -> None:
    told: list[int] = []
    store = ExpertStore(lambda: told.append(len(store.experts())))
    one, other, third = (ExpertVersion(ExpertAddress(0, 1), held(tag).version) for tag in (1, 2, 3))
    expert = held(0).expert
    with pytest.raises(Aborted, match="unloaded"):
        store.add_all({one: expert, other: expert}, beside=[third])
    assert not store.experts()
    store.add_all({third: expert})
    store.add_all({one: expert, other: expert}, beside=[third])
    assert told == [1, 3]
    assert store.holds(one) and not store.holds(ExpertVersion(ExpertAddress(0, 2), one.digest))


def test_the_revision_grows_with_every_change_and_is_told() -> None:
    told: list[int] = []
    store = ExpertStore(lambda: told.append(store.revision))
    store.add(ExpertAddress(0, 1), held(1))
    store.add(ExpertAddress(0, 1), held(2))
    for _ in range(2):
        store.remove_all([ExpertVersion(ExpertAddress(0, 1), held(1).version)])
    assert told == [1, 2, 3] and store.revision == 3


def test_experts_come_and_go_while_others_are_read() -> None:
    store, steady = ExpertStore(), held(0)
    store.add(ExpertAddress(0, 0), steady)

    def change(slot: int) -> None:
        for tag in range(1, 100):
            store.add(ExpertAddress(0, slot), held(tag))
            store.remove_all([ExpertVersion(ExpertAddress(0, slot), held(tag).version)])

    def read(_: int) -> None:
        for _ in range(200):
            assert store.get(ExpertAddress(0, 0), steady.version, field="f") is steady.expert
            assert (ExpertAddress(0, 0), steady.version) in store.experts()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, slot) for slot in (0, 1) for work in (change, read)]:
            done.result()
    assert list(store.experts()) == [(ExpertAddress(0, 0), steady.version)]
    assert store.revision == 1 + 4 * 99
