"""Loads are exact in length, different where they should be, and the same for the same seed."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from cluster.bench.workload import Lengths, Workload, parse_numbers, parse_rates, poisson_arrivals
from moesaic.errors import InvalidArgument

VOCABULARY = 100


def workload(prompt: str = "8-16", output: str = "4", shared_prefix: int = 0, seed: int = 0) -> Workload:
    return Workload(
        Lengths.parse(prompt, field="prompt_len"),
        Lengths.parse(output, field="output_len"),
        shared_prefix,
        seed,
    )


def test_lengths_stay_in_their_range_and_reach_both_ends() -> None:
    requests = workload("8-10", "4-6").requests(200, VOCABULARY, batch="a")
    assert {len(request.prompt) for request in requests} == {8, 9, 10}
    assert {request.output_tokens for request in requests} == {4, 5, 6}


def test_the_same_seed_gives_the_same_requests() -> None:
    assert workload().requests(5, VOCABULARY, batch="a") == workload().requests(5, VOCABULARY, batch="a")


@pytest.mark.parametrize("other", [("b", 0), ("a", 1)])
def test_another_batch_and_another_seed_give_other_prompts(other: tuple[str, int]) -> None:
    batch, seed = other
    one = workload().requests(5, VOCABULARY, batch="a")
    two = workload(seed=seed).requests(5, VOCABULARY, batch=batch)
    assert {request.prompt[:4] for request in one}.isdisjoint(request.prompt[:4] for request in two)


def test_a_shared_prefix_is_that_of_every_prompt_of_every_batch_and_part_of_its_length() -> None:
    shared = workload("16", shared_prefix=12)
    requests = [*shared.requests(3, VOCABULARY, batch="a"), *shared.requests(3, VOCABULARY, batch="b")]
    assert len({request.prompt[:12] for request in requests}) == 1
    assert len({request.prompt for request in requests}) == 6
    assert {len(request.prompt) for request in requests} == {16}


def test_token_ids_are_of_the_vocabulary() -> None:
    ids = {token for request in workload("64").requests(50, 7, batch="a") for token in request.prompt}
    assert ids == set(range(7))


def test_arrivals_come_at_their_rate_and_never_go_back() -> None:
    arrivals = poisson_arrivals(4.0, 4000, seed=1)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *arrivals])]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    # By chance, not by a clock: as much spread as mean.
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)
    assert arrivals == poisson_arrivals(4.0, 4000, seed=1)


@pytest.mark.parametrize("text", ["", "0", "-4", "8-", "16-8", "many", "1.5"])
def test_lengths_that_mean_nothing_name_their_flag(text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        Lengths.parse(text, field="output_len")
    assert refusal.value.field == "output_len"


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1,x", "4,4", "1.5"])
def test_concurrency_that_means_nothing_names_its_flag(text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_numbers(text, field="concurrency")
    assert refusal.value.field == "concurrency"


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e9", "2,2"])
def test_a_rate_that_means_nothing_names_its_flag(text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_rates(text, field="rate")
    assert refusal.value.field == "rate"


def test_requests_longer_than_the_context_are_told_before_they_are_sent() -> None:
    workload("8-16", "4").check(20)
    with pytest.raises(InvalidArgument, match=r"prompt_len: .* up to 20 tokens .* context 19"):
        workload("8-16", "4").check(19)


def test_a_shared_prefix_longer_than_a_prompt_is_told() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        workload("8-16", shared_prefix=9).check(1000)
    assert refusal.value.field == "shared_prefix"
