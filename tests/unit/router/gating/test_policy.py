"""What a policy leaves of an epoch, and which ones are refused."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, GateRow
from moesaic.errors import FailedPrecondition, InvalidArgument, MoesaicError
from moesaic.expert_policy import ExpertPolicy
from router.gating.policy import LayerShape, resolve

SHAPES = {0: LayerShape(4, 2), 1: LayerShape(4, 2)}
DENSE = {0: LayerShape(1, 1, "a dense layer has no gate"), 1: LayerShape(4, 2)}
OWN = {0: LayerShape(4, 2, "the family keeps a gate of its own"), 1: LayerShape(4, 2)}
# Both layers have the slots 0 to 3 of the folder. Bundles added 4 to both layers and 5 to the first, and swapped 1:2.
MATHS = EpochBundle("maths", b"m" * 32, ("numbers",), (ExpertAddress(0, 4), ExpertAddress(1, 4)))
LAW = EpochBundle("law", b"l" * 32, ("text", "numbers"), (ExpertAddress(0, 5),))
STYLE = EpochBundle("style", b"s" * 32, (), (ExpertAddress(1, 2),))


def epoch(shapes: dict[int, LayerShape] = SHAPES) -> Epoch:
    slots = [(layer, slot) for layer, shape in shapes.items() for slot in range(shape.num_slots)]
    if shapes is SHAPES:
        slots += [(0, 4), (0, 5), (1, 4)]
    versions = {ExpertAddress(*address): bytes([*address]) * 16 for address in slots}
    rows = {address: GateRow(bytes(8)) for address in versions if address.slot > 3}
    bundles = (MATHS, LAW, STYLE) if shapes is SHAPES else ()
    return Epoch.of("tiny", versions, gate_rows=rows, bundles=bundles)


def left(shapes: dict[int, LayerShape] = SHAPES, **policy: Any) -> dict[int, tuple[int, ...]]:
    return resolve(ExpertPolicy(**policy), epoch(shapes), shapes)[0]


def test_without_a_policy_everything_is_there() -> None:
    assert left() == {0: (0, 1, 2, 3, 4, 5), 1: (0, 1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("deny", "expected"),
    [
        (["maths"], {0: (0, 1, 2, 3, 5), 1: (0, 1, 2, 3)}),
        (["numbers"], {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}),
        (["style", "0:0"], {0: (1, 2, 3, 4, 5), 1: (0, 1, 3, 4)}),
        (["nobody", "7:1", "0:9"], {0: (0, 1, 2, 3, 4, 5), 1: (0, 1, 2, 3, 4)}),
    ],
    ids=["bundle", "tag", "swapped and slot", "unknown"],
)
def test_denied_are_a_bundle_a_tag_or_a_slot_and_what_is_not_there_is_no_error(
    deny: list[str], expected: dict[int, tuple[int, ...]]
) -> None:
    assert left(deny=deny) == expected


def test_of_the_added_slots_only_the_allowed_are_left_and_those_of_the_folder_always() -> None:
    assert left(allow=["law"]) == {0: (0, 1, 2, 3, 5), 1: (0, 1, 2, 3)}
    assert left(allow=["style"]) == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
    assert left(allow=["1:4"], deny=["1:0"]) == {0: (0, 1, 2, 3), 1: (1, 2, 3, 4)}


def test_a_smaller_number_of_experts_a_token_holds_where_a_layer_has_more() -> None:
    shapes = {0: LayerShape(4, 1), 1: LayerShape(4, 3)}
    for wanted, expected in ((1, {0: 1, 1: 1}), (2, {0: 1, 1: 2}), (3, {0: 1, 1: 3})):
        assert resolve(ExpertPolicy(top_k=wanted), epoch(shapes), shapes)[1] == expected


def test_where_fewer_slots_are_left_than_a_token_may_have_it_gets_those() -> None:
    assert resolve(ExpertPolicy(deny=("1:0", "1:1", "1:2", "1:4")), epoch(), SHAPES)[1] == {0: 2, 1: 1}


@pytest.mark.parametrize(
    ("policy", "kind", "field"),
    [
        ({"allow": ["law", "nobody"]}, InvalidArgument, "experts.allow[1]"),
        ({"require": ["maths", "nobody"]}, FailedPrecondition, "experts.require"),
        ({"require": ["1:5"]}, FailedPrecondition, "experts.require"),
        ({"deny": ["1:0", "1:1", "1:2", "1:3", "1:4"]}, InvalidArgument, "experts.deny"),
        ({"top_k": 3}, InvalidArgument, "experts.top_k"),
    ],
    ids=["unknown allowed", "unknown required", "absent required", "nothing left", "too many"],
)
def test_what_cannot_be_had_is_refused_by_field(
    policy: dict[str, Any], kind: type[MoesaicError], field: str
) -> None:
    with pytest.raises(kind) as refused:
        left(**policy)
    assert refused.value.field == field


def test_gates_that_cannot_be_restricted_refuse_a_policy_but_not_a_requirement() -> None:
    for policy in ({"deny": ["0:1"]}, {"allow": ["0:1"]}, {"top_k": 1}):
        with pytest.raises(FailedPrecondition, match="a gate of its own") as refused:
            left(OWN, **policy)
        assert refused.value.field == "experts"
    assert left(OWN, require=["0:1"]) == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}


def test_dense_layers_beside_others_do_not_stand_in_the_way_but_keep_their_one_expert() -> None:
    assert left(DENSE, deny=["1:2"]) == {0: (0,), 1: (0, 1, 3)}
    with pytest.raises(InvalidArgument, match="layer 0"):
        left(DENSE, deny=["0:0"])
