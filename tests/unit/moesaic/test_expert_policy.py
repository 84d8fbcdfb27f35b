"""What a client may say about the experts of its request."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic import Allow, Deny, ExpertPolicy, Require
from moesaic.epoch import ExpertAddress
from moesaic.errors import InvalidArgument
from moesaic.expert_policy import MAX_ENTRIES, MAX_ENTRY_CHARS, address_of
from moesaic.v1 import inference_pb2


def test_words_are_put_together_to_one_policy() -> None:
    policy = Deny("maths-v1", "12:7") | Allow("law") | Require("law") | ExpertPolicy(top_k=4)
    assert policy == ExpertPolicy(deny=["maths-v1", "12:7"], allow=["law"], require=["law"], top_k=4)


def test_of_two_limits_the_smaller_one_holds() -> None:
    assert (ExpertPolicy(top_k=4) | ExpertPolicy(top_k=2)).top_k == 2


def test_an_entry_is_kept_once() -> None:
    assert (Deny("a", "b") | Deny("b", "c")).deny == ("a", "b", "c")


def test_a_policy_is_a_value_whatever_kind_of_list_it_is_made_of() -> None:
    assert hash(ExpertPolicy(deny=["a"])) == hash(Deny("a"))
    assert not ExpertPolicy() and Deny("a") and ExpertPolicy(top_k=1)


def test_the_wire_keeps_a_policy() -> None:
    policy = ExpertPolicy(deny=["a"], allow=["b", "0:1"], require=["c"], top_k=3)
    assert ExpertPolicy.from_pb(policy.to_pb()) == policy
    assert ExpertPolicy.from_pb(ExpertPolicy().to_pb()).top_k is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"deny": ["a", "b", ""]}, "experts.deny[2]"),
        ({"deny": ["x" * (MAX_ENTRY_CHARS + 1)]}, "experts.deny[0]"),
        ({"deny": ["a\0"]}, "experts.deny[0]"),
        ({"allow": ["a", 7]}, "experts.allow[1]"),
        ({"deny": ["12:7", "12:"]}, "experts.deny[1]"),
        ({"deny": ["12:-7"]}, "experts.deny[0]"),
        ({"deny": ["1:2:3"]}, "experts.deny[0]"),
        ({"deny": ["٣:٤"]}, "experts.deny[0]"),
        ({"require": ["a"] * (MAX_ENTRIES + 1)}, "experts.require"),
        ({"deny": "maths-v1"}, "experts.deny"),
        ({"top_k": 0}, "experts.top_k"),
        ({"top_k": True}, "experts.top_k"),
        ({"top_k": 1.5}, "experts.top_k"),
        ({"top_k": 2**32}, "experts.top_k"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_place(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        ExpertPolicy(**fields)
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")


def test_an_address_is_two_numbers_and_everything_else_is_a_name() -> None:
    assert address_of("12:7") == ExpertAddress(12, 7)
    assert address_of("maths-v1") is None


def test_the_last_word_on_missing_experts_holds() -> None:
    wait, fail = ExpertPolicy(on_missing="wait"), ExpertPolicy(on_missing="fail")
    assert (wait | fail).on_missing == "fail" and (Deny("a") | fail | Deny("b")).on_missing == "fail"
    assert wait


@pytest.mark.parametrize("on_missing", [None, "wait", "fail", "substitute", "renormalise"])
def test_the_wire_keeps_what_happens_where_an_expert_is_missing(on_missing: Any) -> None:
    assert ExpertPolicy.from_pb(ExpertPolicy(on_missing=on_missing).to_pb()).on_missing == on_missing


def test_a_word_on_missing_experts_that_there_is_not_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="must be one of wait, fail, substitute, renormalise"):
        ExpertPolicy(on_missing="hope")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as refused:
        ExpertPolicy.from_pb(inference_pb2.ExpertPolicy(on_missing=17))  # type: ignore[arg-type]
    assert refused.value.field == "experts.on_missing"
