"""The text that names a worker's experts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_worker.experts.expert_ranges import parse_experts
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument

EVEN = dict.fromkeys(range(3), 8)
# A dense layer in the router, one with workers, one of four slots, one of eight.
UNEVEN = {1: 1, 2: 4, 3: 8}


def parse(text: str, num_slots: dict[int, int] = EVEN) -> set[tuple[int, int]]:
    return {(layer, slot) for layer, slot in parse_experts(text, num_slots)}


def test_slots_alone_are_taken_in_every_layer() -> None:
    assert parse("0-1") == {(layer, slot) for layer in range(3) for slot in (0, 1)}
    assert parse("5") == {(0, 5), (1, 5), (2, 5)}


def test_layers_may_be_named_one_by_one_or_as_a_range() -> None:
    assert parse("0:0-7,1:2") == {(0, slot) for slot in range(8)} | {(1, 2)}
    assert parse("1-2:3") == {(1, 3), (2, 3)}


def test_items_add_up_and_may_overlap() -> None:
    assert parse("0:1, 0:0-1 ,7") == {(0, 0), (0, 1), (0, 7), (1, 7), (2, 7)}


def test_all_is_everything() -> None:
    assert len(parse("all")) == 24


@pytest.mark.parametrize(
    "text", ["", " ", ",", "0,", "a", "-1", "0-", "0:", ":0", "0:1:2", "0..3", "0x1", "1e3", "٣"]
)
def test_a_text_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    assert caught.value.field == "experts"
    assert "0-3" in caught.value.message


@pytest.mark.parametrize(
    ("text", "limit"), [("8", "8 slots"), ("0-8", "8 slots"), ("3:0", "3 layers"), ("999999", "8")]
)
def test_experts_that_the_model_does_not_have_are_refused_with_the_limit(text: str, limit: str) -> None:
    with pytest.raises(InvalidArgument, match=limit):
        parse(text)


def test_a_range_that_runs_backwards_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="ends before it begins"):
        parse("3-1")


@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 7)), min_size=1))
def test_any_set_of_experts_can_be_written_down(addresses: set[tuple[int, int]]) -> None:
    text = ",".join(f"{layer}:{slot}" for layer, slot in addresses)
    assert parse_experts(text, EVEN) == {ExpertAddress(*address) for address in addresses}


def test_all_is_everything_that_each_layer_has() -> None:
    assert parse("all", UNEVEN) == {(layer, slot) for layer, most in UNEVEN.items() for slot in range(most)}


def test_slots_alone_are_those_that_a_layer_has_of_them() -> None:
    assert parse("0-3", UNEVEN) == {(1, 0), *((layer, slot) for layer in (2, 3) for slot in range(4))}
    assert parse("6-7", UNEVEN) == {(3, 6), (3, 7)}
    assert parse("2-3:3-4", UNEVEN) == {(2, 3), (3, 3), (3, 4)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0-8", "the model has 8 slots, the last is 7"),
        ("2:0-7", "layer 2 of the model has 4 slots, the last is 3"),
        ("1-2:4", "layer 1-2 of the model has 4 slots, the last is 3"),
        ("0:0", "layer 0 has none, 3 layers from 1 to 3 have"),
        ("0-3:0", "layer 0 has none, 3 layers from 1 to 3 have"),
        ("3-999999:0", "layer 4 has none"),
    ],
)
def test_a_range_beyond_all_its_layers_or_a_named_layer_without_experts_is_refused(
    text: str, says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        parse(text, UNEVEN)
    assert caught.value.field == "experts"


@pytest.mark.parametrize("text", ["all", "0", "0:0"])
def test_a_model_without_experts_has_none_for_a_worker(text: str) -> None:
    with pytest.raises(InvalidArgument, match="the model has none for a worker to hold") as caught:
        parse(text, {})
    assert caught.value.field == "experts"
