"""Names by content: the same weights have the same version, the same table is the same epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.epoch import (
    DIGEST_BYTES,
    Epoch,
    ExpertAddress,
    ExpertVersion,
    VersionHasher,
    merge_versions,
    versions_from_proto,
    versions_to_proto,
)
from moesaic.errors import FailedPrecondition
from moesaic.routing_table import Replica
from moesaic.v1 import common_pb2, control_pb2


def digest(tag: int) -> bytes:
    return bytes([tag]) * DIGEST_BYTES


def version(
    *parts: tuple[str, tuple[int, ...], bytes], kind: str = "swiglu", dtype: str = "float32"
) -> bytes:
    hasher = VersionHasher(kind, dtype)
    for part in parts:
        hasher.update(*part)
    return hasher.digest()


VERSIONS = {ExpertAddress(layer, slot): digest(4 * layer + slot) for layer in range(2) for slot in range(4)}
HOLDINGS = Epoch.of("m", VERSIONS).expert_versions


def test_a_version_depends_on_kind_dtype_names_shapes_and_bytes() -> None:
    base = ("gate", (2, 2), bytes(16))
    others = {
        version(base),
        version(base, kind="mlp"),
        version(base, dtype="bfloat16"),
        version(("up", (2, 2), bytes(16))),
        version(("gate", (4, 1), bytes(16))),
        version(("gate", (2, 2), bytes(15) + b"\1")),
        version(base, base),
    }
    assert len(others) == 7
    assert {len(digest) for digest in others} == {DIGEST_BYTES}


def test_a_version_is_stable_over_time() -> None:
    # Written down once: a change here renames every expert version that anybody has published.
    assert version(("gate", (1, 2), b"\0\1\2\3\4\5\6\7")).hex() == (
        "f561dc4f37535508d78c4df9867eb7fa5d1c4ab8eb115265d8e56fd69247dfb0"
    )


def test_an_epoch_is_named_by_its_content_whatever_the_order() -> None:
    shuffled = dict(sorted(VERSIONS.items(), reverse=True))
    assert Epoch.of("m", VERSIONS).id == Epoch.of("m", shuffled).id
    assert Epoch.of("m", VERSIONS).id != Epoch.of("other", VERSIONS).id
    assert Epoch.of("m", VERSIONS).id != Epoch.of("m", VERSIONS | {ExpertAddress(0, 0): digest(99)}).id


def test_an_epoch_travels_and_its_name_is_checked() -> None:
    epoch = Epoch.of("m", VERSIONS)
    message = control_pb2.Epoch.FromString(epoch.to_proto().SerializeToString())
    assert Epoch.from_proto(message) == epoch
    message.experts[0].digest = digest(99)
    with pytest.raises(FailedPrecondition) as caught:
        Epoch.from_proto(message)
    assert caught.value.field == "epoch.id"


@given(st.lists(st.sets(st.sampled_from(sorted(VERSIONS))), max_size=5))
def test_workers_that_hold_all_slots_between_them_make_an_epoch_and_others_do_not(
    held: list[set[ExpertAddress]],
) -> None:
    workers = [{ExpertVersion(address, VERSIONS[address]) for address in addresses} for addresses in held]
    if set().union(*held) == VERSIONS.keys():
        assert merge_versions(workers, VERSIONS.keys()) == VERSIONS
    else:
        with pytest.raises(FailedPrecondition) as caught:
            merge_versions(workers, VERSIONS.keys())
        assert caught.value.reason == "EXPERTS_MISSING"


def test_replicas_that_disagree_are_refused() -> None:
    other = {ExpertVersion(ExpertAddress(1, 2), digest(99))}
    for held in ([HOLDINGS, other], [HOLDINGS | other]):
        with pytest.raises(FailedPrecondition) as caught:
            merge_versions(held, VERSIONS.keys())
        assert caught.value.reason == "VERSIONS_DISAGREE"
        assert "layer 1 slot 2" in caught.value.message


def test_an_expert_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        merge_versions([HOLDINGS], [ExpertAddress(0, slot) for slot in range(4)])
    assert caught.value.reason == "EXPERTS_UNKNOWN"


def test_a_model_without_experts_has_an_epoch_that_is_always_the_same() -> None:
    assert merge_versions([], []) == {}
    empty = Epoch.of("m", {})
    assert empty.id and empty.id == Epoch.of("m", {}).id != Epoch.of("other", {}).id
    assert Epoch.from_proto(control_pb2.Epoch.FromString(empty.to_proto().SerializeToString())) == empty


def test_versions_travel_in_order() -> None:
    messages = versions_to_proto(sorted(HOLDINGS, reverse=True))
    assert [(message.address.layer, message.address.slot) for message in messages] == sorted(VERSIONS)
    assert versions_from_proto(messages) == HOLDINGS


def test_two_versions_of_one_slot_survive_the_wire() -> None:
    both = frozenset(ExpertVersion(ExpertAddress(0, 1), digest(tag)) for tag in (3, 5))
    assert versions_from_proto(versions_to_proto(both)) == both
    replica = Replica("w", "host:1", "w-1", both)
    message = control_pb2.Replica.FromString(replica.to_proto().SerializeToString())
    assert Replica.from_proto(message) == replica


@pytest.mark.parametrize("tag", [3, 5])
def test_an_epoch_that_names_a_slot_twice_is_refused_with_the_slot(tag: int) -> None:
    message = Epoch.of("m", {ExpertAddress(2, 7): digest(3)}).to_proto()
    message.experts.append(message.experts[0])
    message.experts[1].digest = digest(tag)
    with pytest.raises(FailedPrecondition) as caught:
        Epoch.from_proto(message)
    assert "layer 2 slot 7" in caught.value.message
    assert caught.value.field == "epoch.experts"


def test_a_digest_of_the_wrong_length_is_refused() -> None:
    message = common_pb2.ExpertVersion(address=common_pb2.ExpertAddress(layer=0, slot=0), digest=b"short")
    with pytest.raises(FailedPrecondition) as caught:
        versions_from_proto([message])
    assert caught.value.field == "digest"
