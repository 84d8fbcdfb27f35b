"""One pass: callers share it, and each gets its own rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.expert_calls import ReferenceExperts, experts_of
from torch import Tensor

from expert_worker.compute.call import ExpertCall
from expert_worker.compute.compute_pass import compute_calls
from expert_worker.experts.store import ExpertStore, HeldExpert
from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import InvalidArgument

Rows = dict[int, list[int]]


def make_call(
    store: ExpertStore,
    hidden: Tensor,
    rows: Rows,
    *,
    layer: int = 0,
    weights: dict[int, list[float]] | None = None,
) -> ExpertCall:
    experts = experts_of(store)
    return ExpertCall(
        layer,
        hidden,
        [experts[ExpertAddress(layer, slot)] for slot in rows],
        [len(indices) for indices in rows.values()],
        torch.tensor([row for indices in rows.values() for row in indices]),
        None if weights is None else torch.tensor([weight for slot in rows for weight in weights[slot]]),
        deadline_s=float("inf"),
    )


def random_hidden(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(seed))


def outputs(calls: list[ExpertCall]) -> list[Tensor]:
    results = compute_calls(calls)
    assert all(isinstance(result, Tensor) for result in results)
    return [result for result in results if isinstance(result, Tensor)]


@st.composite
def row_assignments(draw: st.DrawFn) -> tuple[int, Rows]:
    """R, and for some of the slots 0 to 2 in any order some ascending rows of R."""
    num_rows = draw(st.integers(1, 9))
    slots = draw(st.permutations(range(3)))[: draw(st.integers(1, 3))]
    one_or_more = st.sets(st.integers(0, num_rows - 1), min_size=1)
    return num_rows, {slot: sorted(draw(one_or_more)) for slot in slots}


@given(assignments=st.lists(row_assignments(), min_size=1, max_size=4), layer=st.integers(0, 1))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_of_any_callers_equal_the_plain_computation(
    store: ExpertStore, folder: Path, assignments: list[tuple[int, Rows]], layer: int
) -> None:
    hidden = [random_hidden(num_rows, seed) for seed, (num_rows, _) in enumerate(assignments)]
    calls = [make_call(store, x, rows, layer=layer) for x, (_, rows) in zip(hidden, assignments, strict=True)]
    reference = ReferenceExperts(folder)
    for x, (_, rows), output in zip(hidden, assignments, outputs(calls), strict=True):
        torch.testing.assert_close(output, reference.rows(layer, x, rows), atol=1e-5, rtol=1e-5)


def test_a_sum_weighs_the_rows_in_the_order_of_the_experts(store: ExpertStore) -> None:
    hidden, rows = random_hidden(4), {2: [0, 1, 3], 0: [1, 3]}
    weights = {2: [0.5, 0.25, 1.0], 0: [0.75, 2.0]}
    (separate,) = outputs([make_call(store, hidden, rows)])
    (summed,) = outputs([make_call(store, hidden, rows, weights=weights)])
    expected = torch.zeros(4, 32)
    for row, index, weight in zip(separate, [0, 1, 3, 1, 3], [0.5, 0.25, 1.0, 0.75, 2.0], strict=True):
        expected[index] += row * weight
    assert torch.equal(summed, expected)
    assert not summed[2].any()


def test_sums_and_rows_of_two_callers_share_a_pass(store: ExpertStore) -> None:
    first = make_call(store, random_hidden(5), {0: [0, 4], 1: [1]})
    second = make_call(
        store, random_hidden(3, seed=1), {1: [0, 2], 0: [1]}, weights={1: [1.0, 2.0], 0: [3.0]}
    )
    together = outputs([first, second])
    for output, call in zip(together, (first, second), strict=True):
        torch.testing.assert_close(output, outputs([call])[0], atol=1e-6, rtol=1e-6)


def test_merged_callers_get_their_rows_in_the_order_of_their_own_experts(store: ExpertStore) -> None:
    calls = [
        make_call(store, random_hidden(5), {0: [0, 4], 2: [1, 2]}),
        make_call(store, random_hidden(4, seed=1), {2: [3], 1: [0, 1], 0: [0, 2]}),
        make_call(store, random_hidden(1, seed=2), {1: [0]}),
    ]
    for output, call in zip(outputs(calls), calls, strict=True):
        torch.testing.assert_close(output, outputs([call])[0], atol=1e-6, rtol=1e-6)


def test_slots_that_are_one_expert_each_get_their_own_rows(store: ExpertStore) -> None:
    expert = experts_of(store)[ExpertAddress(0, 1)]
    first, second = (random_hidden(4, seed) for seed in (0, 1))
    rows = torch.tensor([0, 3, 1, 2])
    calls = [ExpertCall(0, x, [expert, expert], [1, 3], rows, None, float("inf")) for x in (first, second)]
    for output, x in zip(outputs(calls), (first, second), strict=True):
        torch.testing.assert_close(output, expert(x)[rows], atol=1e-6, rtol=1e-6)


def test_callers_of_two_versions_of_a_slot_share_a_pass_and_each_gets_its_own(store: ExpertStore) -> None:
    """The experts of slots 0 and 1 stand for two versions of one slot."""
    address, held = ExpertAddress(0, 0), experts_of(store)
    both = ExpertStore()
    for tag, slot in ((b"1", 0), (b"2", 1)):
        both.add(address, HeldExpert(tag * 32, held[ExpertAddress(0, slot)]))
    x, rows = random_hidden(3), torch.tensor([0, 2])
    experts = [both.get(address, tag * 32, field="f") for tag in (b"1", b"2")]
    calls = [ExpertCall(0, x, [expert], [2], rows, None, float("inf")) for expert in experts]
    both.remove_all([ExpertVersion(address, b"1" * 32)])  # an expert in flight outlives its removal
    for output, expert in zip(outputs(calls), experts, strict=True):
        torch.testing.assert_close(output, expert(x)[rows], atol=1e-6, rtol=1e-6)
    assert not torch.equal(*outputs(calls))


def test_callers_may_send_rows_of_different_dtypes_into_one_pass(store: ExpertStore) -> None:
    wide = make_call(store, random_hidden(3), {0: [0, 2]})
    narrow = make_call(store, random_hidden(2, seed=1).bfloat16(), {0: [1], 1: [0]})
    first, second = outputs([wide, narrow])
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(first, outputs([wide])[0], atol=1e-6, rtol=1e-6)


def test_a_pass_does_not_write_into_the_rows_of_its_callers(store: ExpertStore) -> None:
    hidden = random_hidden(2)
    before = hidden.clone()
    outputs([make_call(store, hidden, {0: [0, 1]}, weights={0: [2.0, 3.0]})])
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_rows(store: ExpertStore, dtype: torch.dtype) -> None:
    hidden = random_hidden(3).to(dtype)
    rows: Rows = {0: [0, 2], 1: [1]}
    (exact,) = outputs([make_call(store, hidden.float(), rows)])
    (separate,) = outputs([make_call(store, hidden, rows)])
    (summed,) = outputs([make_call(store, hidden, rows, weights={0: [1.0, 1.0], 1: [1.0]})])
    assert separate.dtype == summed.dtype == dtype
    assert torch.equal(separate, exact.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_not_finite_fail_their_own_call_alone(
    store: ExpertStore, bad: float, dtype: torch.dtype
) -> None:
    hidden = random_hidden(3).to(dtype)
    hidden[1, 7] = bad
    good = make_call(store, random_hidden(2), {1: [0, 1]})
    refused, answered = compute_calls([make_call(store, hidden, {1: [0]}), good])
    assert isinstance(refused, InvalidArgument) and refused.field == "hidden.data"
    assert isinstance(answered, Tensor) and torch.equal(answered, outputs([good])[0])


def test_finite_rows_whose_sum_is_not_are_computed(store: ExpertStore) -> None:
    hidden = torch.full((2, 32), 3e38)
    (output,) = compute_calls([make_call(store, hidden, {0: [0]})])
    assert isinstance(output, Tensor)


def test_a_pass_of_refused_calls_alone_computes_nothing(store: ExpertStore) -> None:
    (refused,) = compute_calls([make_call(store, torch.full((1, 32), float("nan")), {0: [0]})])
    assert isinstance(refused, InvalidArgument)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_experts_beside_it_do_not_change_a_bit_of_an_expert(store: ExpertStore, count: int) -> None:
    """Wherever an expert is placed, it meets the same rows, and so it gives the same bits."""
    hidden, rows = random_hidden(9), list(range(count))
    (alone,) = outputs([make_call(store, hidden, {1: rows})])
    (beside,) = outputs([make_call(store, hidden, {2: [0, 3, 8], 1: rows, 0: [5]})])
    assert torch.equal(alone, beside[3 : 3 + count])
