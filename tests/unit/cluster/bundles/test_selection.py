"""Which experts go into a bundle, and where they are to go."""

from __future__ import annotations

import pytest

from cluster.bundles.selection import (
    Candidate,
    Origin,
    Wanted,
    choose,
    find_origin,
    parse_into,
    parse_numbers,
)
from moesaic.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", {3}), ("0, 2-4", {0, 2, 3, 4}), ("7-7", {7}), (None, None)]
)
def test_numbers_and_ranges_are_read(text: str | None, numbers: set[int] | None) -> None:
    assert parse_numbers(text, "layers") == numbers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-2", "1,,2", "9999999"])
def test_other_texts_name_the_field(text: str) -> None:
    with pytest.raises(InvalidArgument, match="slots:") as refused:
        parse_numbers(text, "slots")
    assert refused.value.field == "slots"


def test_where_experts_go_is_new_or_same() -> None:
    assert (parse_into("new"), parse_into("same"), parse_into(None)) == ("new", "same", None)
    with pytest.raises(InvalidArgument, match="into:"):
        parse_into("elsewhere")


@pytest.mark.parametrize(
    ("tuned", "base", "origin"),
    [
        ({0: 8, 1: 8}, {0: 8, 1: 8}, Origin.SAME_SIZE),
        ({0: 9, 1: 9}, {0: 8, 1: 8}, Origin.MORE_SLOTS),
        ({0: 2, 1: 2}, {0: 7, 1: 7}, Origin.PUBLIC_AND_OWN),
        ({0: 2}, {0: 1}, Origin.MORE_SLOTS),
    ],
)
def test_what_a_folder_is_follows_from_its_slots(
    tuned: dict[int, int], base: dict[int, int], origin: Origin
) -> None:
    assert find_origin(tuned, base, dense=False) is origin


@pytest.mark.parametrize(
    ("tuned", "base"), [({0: 3}, {0: 8}), ({0: 8}, {0: 8, 1: 8}), ({0: 9, 1: 7}, {0: 8, 1: 8}), ({}, {0: 8})]
)
def test_a_model_that_is_none_of_these_is_refused(tuned: dict[int, int], base: dict[int, int]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        find_origin(tuned, base, dense=False)
    assert refused.value.field == "model"


def test_slots_of_the_base_go_into_their_own() -> None:
    chosen = choose(Origin.SAME_SIZE, {0: 2}, {0: 2}, Wanted())
    assert chosen == (Candidate(0, 0, 0), Candidate(0, 1, 1))


def test_further_slots_become_new_ones() -> None:
    assert choose(Origin.MORE_SLOTS, {0: 3, 1: 4}, {0: 3 - 1, 1: 3}, Wanted()) == (
        Candidate(0, 2, None),
        Candidate(1, 3, None),
    )


def test_a_later_version_of_an_added_slot_replaces_it() -> None:
    wanted = Wanted(slots=frozenset({8}), into="same")
    assert choose(Origin.MORE_SLOTS, {0: 9}, {0: 8}, wanted) == (Candidate(0, 8, 8),)


def test_the_second_half_of_a_pair_is_its_own() -> None:
    assert choose(Origin.PUBLIC_AND_OWN, {0: 2}, {0: 7}, Wanted()) == (Candidate(0, 1, None),)
    with pytest.raises(InvalidArgument, match="slots below 1"):
        choose(Origin.PUBLIC_AND_OWN, {0: 2}, {0: 7}, Wanted(slots=frozenset({0})))
    with pytest.raises(InvalidArgument, match="into:"):
        choose(Origin.PUBLIC_AND_OWN, {0: 2}, {0: 7}, Wanted(into="same"))


def test_a_bundle_never_both_replaces_and_adds() -> None:
    with pytest.raises(InvalidArgument, match="pack a bundle of each"):
        choose(Origin.MORE_SLOTS, {0: 9}, {0: 8}, Wanted(slots=frozenset({3, 8})))


@pytest.mark.parametrize(
    ("wanted", "field"),
    [(Wanted(layers=frozenset({5})), "layers"), (Wanted(slots=frozenset({9})), "slots")],
)
def test_what_the_model_does_not_have_is_refused(wanted: Wanted, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        choose(Origin.SAME_SIZE, {0: 8}, {0: 8}, wanted)
    assert refused.value.field == field
