"""A worker gives the very version that was asked for, or says why not."""

from __future__ import annotations

import pytest

from expert_worker.experts.store import ExpertStore
from moesaic.epoch import ExpertAddress
from moesaic.errors import FailedPrecondition
from moesaic.families import MoeModel


def test_the_version_that_is_asked_for_is_given(store: ExpertStore) -> None:
    address = ExpertAddress(1, 2)
    assert store.get(address, store.versions()[address], field="f") is store.experts()[address]


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
    assert store.versions()[address].hex()[:12] in caught.value.message


def test_the_weights_in_memory_are_counted(store: ExpertStore, model: MoeModel) -> None:
    assert store.weight_bytes == 6 * model.expert_bytes(0)
    assert list(store.versions()) == [ExpertAddress(layer, slot) for layer in range(2) for slot in range(3)]
