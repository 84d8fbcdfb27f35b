"""One MoE layer over several workers: how rows travel, how they are combined, who pays for a failure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.fake_links import Answer, FakeLink, failing, make_epoch, make_pool, spoiled

from moesaic.errors import DeadlineExceeded, Overloaded, Unavailable
from router.dispatcher import Dispatcher, DispatchStep, combine, group_by_slot
from router.phases import PhaseClock

NUM_SLOTS = 4
HIDDEN = torch.arange(12, dtype=torch.float32).view(4, 3) + 1
SLOTS = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 2]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]])
# Expert s multiplies by s + 1.
EXPECTED = HIDDEN * (WEIGHTS * (SLOTS + 1)).sum(dim=1, keepdim=True)


def dispatch(
    workers: Mapping[str, range],
    answers: Mapping[str, Answer] | None = None,
    *,
    hidden: torch.Tensor = HIDDEN,
    slots: torch.Tensor = SLOTS,
    weights: torch.Tensor = WEIGHTS,
) -> tuple[torch.Tensor, DispatchStep, dict[str, FakeLink]]:
    epoch = make_epoch(1, NUM_SLOTS)
    pool, links = make_pool(epoch, workers, answers)
    dispatcher = Dispatcher(pool, PhaseClock(), call_timeout_s=5.0)
    step = dispatcher.begin(epoch, deadline_s=time.monotonic() + 5.0)
    return step.compute(0, hidden, slots, weights), step, links


def test_the_layer_equals_the_weighted_sum_of_its_experts() -> None:
    output, step, _ = dispatch({"a": range(2), "b": range(2, 4)})
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed


def test_one_message_goes_to_each_worker_and_holds_each_token_once() -> None:
    _, _, links = dispatch({"a": range(2), "b": range(2, 4)})
    (to_a,), (to_b,) = links["a"].requests, links["b"].requests
    assert list(to_a.hidden.shape) == [3, 3]  # tokens 0, 2 and 3; token 0 goes to both of its experts there
    assert [(rows.slot, list(rows.rows)) for rows in to_a.experts] == [(0, [0, 1]), (1, [0, 2])]
    assert [(rows.slot, list(rows.rows)) for rows in to_b.experts] == [(2, [0, 2]), (3, [0, 1])]


def test_a_worker_without_rows_gets_no_message() -> None:
    _, _, links = dispatch({"a": range(2), "b": range(2, 4)}, slots=torch.tensor([[0, 1]] * 4))
    assert len(links["a"].requests) == 1 and not links["b"].requests


@given(
    boundaries=st.lists(st.integers(1, NUM_SLOTS - 1), max_size=3, unique=True),
    seed=st.integers(0, 1000),
)
def test_any_placement_gives_the_very_same_bits(boundaries: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(6, 5, generator=generator)
    ranked = torch.rand(6, NUM_SLOTS, generator=generator).softmax(-1).sort(descending=True)
    weights, slots = ranked.values[:, :3], ranked.indices[:, :3]
    edges = [0, *sorted(boundaries), NUM_SLOTS]
    placement = {str(i): range(*pair) for i, pair in enumerate(itertools.pairwise(edges))}

    whole, _, _ = dispatch({"all": range(NUM_SLOTS)}, hidden=hidden, slots=slots, weights=weights)
    spread, _, _ = dispatch(placement, hidden=hidden, slots=slots, weights=weights)

    assert torch.equal(whole, spread)


@pytest.mark.parametrize(
    "broken",
    [
        failing(Unavailable("gone")),
        failing(TimeoutError()),
        failing(Overloaded("full")),
        spoiled(epoch="another"),
        spoiled(versions=[b"x" * 32, b"y" * 32]),
        spoiled(output=lambda rows: rows[:-1]),
        spoiled(output=lambda rows: rows.to(torch.bfloat16)),
        spoiled(output=lambda rows: rows.clone().fill_(float("nan"))),
    ],
    ids=["gone", "late", "full", "epoch", "versions", "shape", "dtype", "nan"],
)
def test_a_replica_answers_in_place_of_one_that_fails(broken: Answer) -> None:
    workers = {"a": range(2), "b": range(2, 4), "b2": range(2, 4)}
    output, step, links = dispatch(workers, {"b": broken})
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed
    assert len(links["b"].requests) == len(links["b2"].requests) == 1


def test_without_a_replica_only_the_tokens_of_the_failed_worker_fail() -> None:
    output, step, links = dispatch({"a": range(3), "b": range(3, 4)}, {"b": failing(Unavailable("gone"))})
    assert set(step.failed) == {1, 2}  # the tokens that slot 3 should compute
    assert all(isinstance(error, Unavailable) for error in step.failed.values())
    torch.testing.assert_close(output[[0, 3]], EXPECTED[[0, 3]])
    assert len(links["b"].requests) == 1, "it is not asked again"


def test_the_error_says_what_happened_and_not_where() -> None:
    _, step, _ = dispatch({"a": range(4)}, {"a": failing(TimeoutError())})
    assert {type(error) for error in step.failed.values()} == {DeadlineExceeded}
    assert step.failed[0].message == "layer 0: an expert worker did not answer in time"


def test_an_expert_that_nobody_holds_is_an_error_for_its_tokens() -> None:
    _, step, _ = dispatch({"a": range(3)})
    assert set(step.failed) == {1, 2}
    assert step.failed[1].reason == "NO_REPLICA"


def test_a_silent_worker_is_waited_for_once_a_step_not_once_a_layer() -> None:
    epoch = make_epoch(3, NUM_SLOTS)
    pool, links = make_pool(epoch, {"a": range(4)}, {"a": failing(TimeoutError())})
    dispatcher = Dispatcher(pool, PhaseClock(), call_timeout_s=5.0)
    step = dispatcher.begin(epoch, deadline_s=time.monotonic() + 5.0)
    for layer in range(3):
        step.compute(layer, HIDDEN, SLOTS, WEIGHTS)
    assert len(links["a"].requests) == 1


def test_shares_are_ordered_by_slot_and_keep_token_order() -> None:
    shares = group_by_slot(torch.tensor([[3, 1], [1, 0]]))
    assert [(share.slot, share.tokens.tolist(), share.assignments.tolist()) for share in shares] == [
        (0, [1], [3]),
        (1, [0, 1], [1, 2]),
        (3, [0], [0]),
    ]


def test_combining_accumulates_in_float32_whatever_the_rows_are() -> None:
    rows = torch.tensor([[[256.0], [1.0], [1.0]]], dtype=torch.bfloat16)
    combined = combine(rows, torch.ones(1, 3))
    assert combined.dtype == torch.bfloat16 and combined.item() == 258.0  # 256 in bf16 arithmetic
