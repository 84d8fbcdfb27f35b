"""One MoE layer over several workers: how rows travel, how they are combined, who pays for a failure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.fake_links import Answerer, FakeLink, failing, make_epoch, make_pool, scaled_rows, spoiled
from support.views import whole

from moesaic.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Overloaded, Unavailable
from moesaic.routing_table import RoutingTable
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.tensors import encode_rows
from router.dispatch.combine import combine
from router.dispatch.dispatcher import Dispatcher, DispatchRules, DispatchStep
from router.dispatch.host_staging import HostStaging
from router.gating.gate import NO_SLOT
from router.phase_clock import PhaseClock
from router.workers.replica_pool import SHARE_ROWS
from router.workers.transports.base import HOST_SILENT, WorkerAnswer

NUM_SLOTS = 4
HIDDEN = torch.arange(12, dtype=torch.float32).view(4, 3) + 1
SLOTS = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 2]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]])
# Expert s multiplies by s + 1.
EXPECTED = HIDDEN * (WEIGHTS * (SLOTS + 1)).sum(dim=1, keepdim=True)


def dispatch(
    workers: Mapping[str, range],
    answers: Mapping[str, Answerer] | None = None,
    *,
    hidden: torch.Tensor = HIDDEN,
    slots: torch.Tensor = SLOTS,
    weights: torch.Tensor = WEIGHTS,
    clock: PhaseClock | None = None,
    **rules: Any,
) -> tuple[torch.Tensor, DispatchStep, dict[str, FakeLink]]:
    epoch = make_epoch(1, NUM_SLOTS)
    pool, links = make_pool(epoch, workers, answers)
    dispatcher = Dispatcher(pool, clock or PhaseClock(), DispatchRules(call_timeout_s=60.0, **rules))
    step = dispatcher.begin(whole(epoch), deadline_s=time.monotonic() + 60.0)
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


@pytest.mark.parametrize("combine_sum", [False, True])
def test_a_rank_without_a_slot_is_asked_of_nobody_and_adds_nothing(combine_sum: bool) -> None:
    slots = torch.tensor([[0, NO_SLOT], [2, 3], [NO_SLOT, NO_SLOT], [1, 2]])
    weights = WEIGHTS.masked_fill(slots == NO_SLOT, 0)
    output, step, links = dispatch({"all": range(4)}, slots=slots, weights=weights, combine_sum=combine_sum)
    torch.testing.assert_close(output, HIDDEN * (weights * (slots + 1)).sum(dim=1, keepdim=True))
    assert not step.failed
    (request,) = links["all"].requests
    assert sum(len(expert.rows) for expert in request.experts) == 5


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
        spoiled(output=lambda rows: rows, dtype=common_pb2.DTYPE_BFLOAT16),
        spoiled(output=lambda rows: rows.clone().fill_(float("nan"))),
    ],
    ids=["gone", "late", "full", "epoch", "versions", "shape", "dtype", "nan"],
)
def test_a_replica_answers_in_place_of_one_that_fails(broken: Answerer) -> None:
    workers = {"a": range(2), "b": range(2, 4), "b2": range(2, 4)}
    output, step, links = dispatch(workers, {"b": broken})
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed
    assert len(links["b"].requests) == len(links["b2"].requests) == 1


@pytest.mark.parametrize(
    "broken", [failing(TimeoutError()), failing(Overloaded("full"))], ids=["late", "full"]
)
def test_a_replica_of_the_same_name_answers_in_place_of_one_that_fails(broken: Answerer) -> None:
    epoch = make_epoch(2, NUM_SLOTS)
    workers = {"first": range(4), "second": range(4)}
    pool, links = make_pool(epoch, workers, {"first": broken}, name="worker-0")
    step = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0)).begin(
        whole(epoch), deadline_s=time.monotonic() + 60.0
    )
    for layer in range(2):
        torch.testing.assert_close(step.compute(layer, HIDDEN, SLOTS, WEIGHTS), EXPECTED)
    assert not step.failed
    assert links["first"].requests and len(links["second"].requests) == 2


@pytest.mark.parametrize("num_tokens", [1, SHARE_ROWS * NUM_SLOTS])
def test_replicas_share_the_rows_and_the_bits_are_those_of_one(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(num_tokens, 5, generator=generator)
    ranked = torch.rand(num_tokens, NUM_SLOTS, generator=generator).softmax(-1).sort(descending=True)
    weights, slots = ranked.values[:, :2], ranked.indices[:, :2]
    epoch = make_epoch(2, NUM_SLOTS)
    outputs = []
    for workers in ({"all": range(NUM_SLOTS)}, dict.fromkeys(("a", "b"), range(NUM_SLOTS))):
        pool, links = make_pool(epoch, workers)
        step = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0)).begin(
            whole(epoch), deadline_s=time.monotonic() + 60.0
        )
        outputs.append([step.compute(layer, hidden, slots, weights) for layer in range(2)])
        asked = [len(link.requests) for link in links.values()]
    assert all(torch.equal(one, shared) for one, shared in zip(*outputs, strict=True))
    # One row goes to either in turn; what is worth two messages goes to both at once.
    assert asked == ([1, 1] if num_tokens == 1 else [2, 2])


def test_without_a_replica_only_the_tokens_of_the_failed_worker_fail() -> None:
    output, step, links = dispatch({"a": range(3), "b": range(3, 4)}, {"b": failing(Unavailable("gone"))})
    assert set(step.failed) == {1, 2}  # the tokens that slot 3 should compute
    assert all(isinstance(error, Unavailable) for error in step.failed.values())
    torch.testing.assert_close(output[[0, 3]], EXPECTED[[0, 3]])
    assert len(links["b"].requests) == 1, "it is not asked again"


def test_failures_are_told_by_the_tokens_that_the_rows_are() -> None:
    _, step, _ = dispatch({"a": range(3)})
    step.failed.clear()
    step.receive(step.send(0, HIDDEN, SLOTS, WEIGHTS, tokens=[10, 20, 30, 40]))
    assert set(step.failed) == {20, 30}


def test_the_error_says_what_happened_and_not_where() -> None:
    _, step, _ = dispatch({"a": range(4)}, {"a": failing(TimeoutError())})
    assert {type(error) for error in step.failed.values()} == {DeadlineExceeded}
    assert step.failed[0].message == "layer 0: an expert worker did not answer in time"


@pytest.mark.parametrize(
    ("worker", "told"), [("expert-worker-1", "expert-worker-1"), ("10.0.0.7:5001", "the expert worker")]
)
def test_a_worker_that_dies_with_the_only_copy_is_named_with_the_cure_and_without_an_address(
    worker: str, told: str
) -> None:
    _, step, _ = dispatch({worker: range(4)}, {worker: failing(Unavailable("gone"))})
    assert {error.message for error in step.failed.values()} == {
        f"layer 0: {told} died or failed, and no other worker stood in; --replicas 2 keeps requests alive"
    }


def test_an_expert_whose_worker_is_gone_is_told_with_that_worker() -> None:
    epoch = make_epoch(1, NUM_SLOTS)
    pool, links = make_pool(epoch, {"expert-worker-1": range(4)}, {})
    links["expert-worker-1"].is_lost = True
    pool.update(RoutingTable(1 << 40, ()))
    step = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0)).begin(
        whole(epoch), deadline_s=time.monotonic() + 60.0
    )
    step.compute(0, HIDDEN, SLOTS, WEIGHTS)
    assert step.failed[0].reason == "NO_REPLICA"
    assert step.failed[0].message.endswith(
        "has no replica left: expert-worker-1 that held it is gone and not back yet; "
        "--replicas 2 keeps requests alive"
    )


def test_an_expert_that_nobody_holds_is_an_error_for_its_tokens() -> None:
    _, step, _ = dispatch({"a": range(3)})
    assert set(step.failed) == {1, 2}
    assert step.failed[1].reason == "NO_REPLICA"


@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_the_experts_that_somebody_holds_are_combined_beside_one_that_nobody_does(combine_sum: bool) -> None:
    output, step, _ = dispatch({"a": range(2), "b": range(2, 3)}, combine_sum=combine_sum)
    assert set(step.failed) == {1, 2}
    held = WEIGHTS.masked_fill(SLOTS == 3, 0)
    torch.testing.assert_close(output, HIDDEN * (held * (SLOTS + 1)).sum(dim=1, keepdim=True))


def test_a_worker_that_failed_is_left_out_even_where_nobody_else_is_left() -> None:
    epoch = make_epoch(2, NUM_SLOTS)
    pool, links = make_pool(epoch, {"a": range(4)}, {"a": failing(Overloaded("full", retry_after_s=2.0))})
    step = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0)).begin(
        whole(epoch), deadline_s=time.monotonic() + 60.0
    )
    step.compute(0, HIDDEN, SLOTS, WEIGHTS)
    assert len(links["a"].requests) == 1
    # Its own error says more than that no replica is left.
    assert {(type(error), error.retry_after_s) for error in step.failed.values()} == {(Overloaded, 2.0)}
    step.compute(1, HIDDEN, SLOTS, WEIGHTS)
    assert len(links["a"].requests) == 2, "whoever is overloaded is no silent worker"


def test_a_second_wave_leaves_out_an_overloaded_worker_for_its_own_rows_alone() -> None:
    errors = [Overloaded("full")]

    def full_at_first(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
        if errors:
            raise errors.pop()
        return scaled_rows(request, hidden)

    workers = {"a-gone": range(2), "b-full": range(4), "c-spare": range(2, 4)}
    answers = {"a-gone": failing(Unavailable("gone")), "b-full": full_at_first}
    output, step, links = dispatch(workers, answers)
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed
    asked = {
        worker: [[rows.slot for rows in request.experts] for request in link.requests]
        for worker, link in links.items()
    }
    assert asked == {"a-gone": [[0, 1]], "b-full": [[2, 3], [0, 1]], "c-spare": [[2, 3]]}


def test_a_second_wave_leaves_out_a_worker_that_was_silent_about_other_rows() -> None:
    workers = {"a": range(2), "full": range(3, 4), "mute": range(2, 4)}
    answers = {"full": failing(Overloaded("full")), "mute": failing(TimeoutError())}
    output, step, links = dispatch(workers, answers)
    assert [len(links[worker].requests) for worker in workers] == [1, 1, 1]
    assert type(step.failed[2]) is Overloaded and type(step.failed[3]) is DeadlineExceeded
    torch.testing.assert_close(output[0], EXPECTED[0])


def test_a_silent_worker_is_waited_for_once_a_step_not_once_a_layer() -> None:
    epoch = make_epoch(3, NUM_SLOTS)
    pool, links = make_pool(epoch, {"a": range(4)}, {"a": failing(TimeoutError())})
    dispatcher = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0))
    step = dispatcher.begin(whole(epoch), deadline_s=time.monotonic() + 60.0)
    for layer in range(3):
        step.compute(layer, HIDDEN, SLOTS, WEIGHTS)
    assert len(links["a"].requests) == 1


SILENT_HOST = Unavailable("the worker's host is silent", reason=HOST_SILENT)


def test_a_worker_whose_host_is_silent_is_not_asked_again_where_another_one_holds_its_experts() -> None:
    output, step, links = dispatch(
        {"a": range(4), "b": range(4)}, {"a": failing(SILENT_HOST), "b": scaled_rows}
    )
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and len(links["a"].requests) == 1


def test_a_worker_whose_host_is_silent_is_asked_once_more_where_it_is_the_only_one() -> None:
    errors = [SILENT_HOST]

    def silent_at_first(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
        if errors:
            raise errors.pop()
        return scaled_rows(request, hidden)

    output, step, links = dispatch({"a": range(4)}, {"a": silent_at_first})
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and len(links["a"].requests) == 2


def test_a_worker_that_fails_over_the_next_connection_too_is_not_asked_again_in_the_step() -> None:
    errors = [Unavailable("gone"), SILENT_HOST]

    def gone(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
        raise errors.pop()

    epoch = make_epoch(2, NUM_SLOTS)
    pool, links = make_pool(epoch, {"a": range(4)}, {"a": gone})
    step = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0)).begin(
        whole(epoch), deadline_s=time.monotonic() + 60.0
    )
    for layer in range(2):
        step.compute(layer, HIDDEN, SLOTS, WEIGHTS)
    assert len(links["a"].requests) == 2


@pytest.mark.parametrize(
    ("workers", "most_ms"), [({"a": range(4)}, 400_000), ({"a": range(4), "b": range(4)}, 200_000)]
)
def test_a_first_wave_leaves_time_for_a_second_one_where_there_are_replicas(
    workers: dict[str, range], most_ms: int
) -> None:
    epoch = make_epoch(1, NUM_SLOTS)
    pool, links = make_pool(epoch, workers)
    step = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=3000.0)).begin(
        whole(epoch), deadline_s=time.monotonic() + 400.0
    )
    step.compute(0, HIDDEN, SLOTS, WEIGHTS)
    (asked,) = [link.requests[0] for link in links.values() if link.requests]
    assert most_ms - 100_000 < asked.timeout_ms <= most_ms + 1


def test_what_is_abandoned_in_flight_is_given_up_once() -> None:
    epoch = make_epoch(2, NUM_SLOTS)
    pool, links = make_pool(epoch, {"a": range(2), "b": range(2, 4)})
    dispatcher = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0))
    step = dispatcher.begin(whole(epoch), deadline_s=time.monotonic() + 60.0)
    step.compute(0, HIDDEN, SLOTS, WEIGHTS)
    step.send(1, HIDDEN, SLOTS, WEIGHTS)
    step.abandon()
    for link in links.values():
        received, given_up = (request.call_id for request in link.requests)
        assert link.received == [received] and link.abandoned == [given_up]


@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_combining_accumulates_in_float32_whatever_the_rows_are(combine_sum: bool) -> None:
    # 256 + 1 + 1 is 256 in the arithmetic of bfloat16; expert s multiplies by s + 1.
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16)
    workers = {str(slot): range(slot, slot + 1) for slot in range(3)}
    output, _, _ = dispatch(
        workers,
        hidden=hidden,
        slots=torch.tensor([[0, 1, 2]]),
        weights=torch.tensor([[256.0, 0.5, 1 / 3]]),
        combine_sum=combine_sum,
    )
    assert output.dtype == torch.bfloat16 and output.item() == 258.0


def test_combining_goes_rank_by_rank() -> None:
    rows = torch.tensor([[[1e8], [1.0], [-1e8]]])
    assert combine(rows, torch.ones(1, 3)).item() == 0.0  # 1 is lost in 1e8, as the order says
    assert combine(rows[:, [0, 2, 1]], torch.ones(1, 3)).item() == 1.0


def test_sums_of_workers_equal_the_layer_and_bring_one_row_a_token_back() -> None:
    output, step, links = dispatch({"a": range(2), "b": range(2, 4)}, combine_sum=True)
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed
    (to_a,) = links["a"].requests
    assert to_a.combine == expert_pb2.COMBINE_SUM
    torch.testing.assert_close(
        [list(expert.weights) for expert in to_a.experts], [[0.75, 0.9], [0.25, 0.6]], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_a_failed_worker_is_replaced_in_either_way_of_combining(combine_sum: bool) -> None:
    workers = {"a": range(2), "b": range(2, 4), "b2": range(2, 4)}
    for broken in (failing(Unavailable("gone")), spoiled(output=lambda rows: rows * float("inf"))):
        output, step, _ = dispatch(workers, {"b": broken}, combine_sum=combine_sum)
        torch.testing.assert_close(output, EXPECTED)
        assert not step.failed


@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_rows_that_are_not_finite_are_blamed_on_their_worker_and_never_used(combine_sum: bool) -> None:
    nan = spoiled(output=lambda rows: rows * float("nan"))
    output, step, _ = dispatch({"a": range(2), "b": range(2, 4)}, {"b": nan}, combine_sum=combine_sum)
    assert set(step.failed) == {1, 2, 3}
    assert {error.reason for error in step.failed.values()} == {"NOT_FINITE"}
    assert output.isfinite().all()
    torch.testing.assert_close(output[0], EXPECTED[0])


@pytest.mark.parametrize(
    "broken",
    [
        spoiled(epoch="another"),
        spoiled(output=lambda rows: rows[:-1]),
        spoiled(output=lambda rows: rows * float("nan")),
    ],
    ids=["epoch", "shape", "nan"],
)
def test_every_answer_that_fails_a_check_is_a_failed_call(broken: Answerer) -> None:
    _, step, links = dispatch({"a": range(4), "b": range(4)}, {"a": broken})
    assert not step.failed
    assert [links[name].traffic.failed_calls for name in "ab"] == [1, 0]


def test_sums_that_overflow_are_nobodys_fault() -> None:
    hidden = torch.full((1, 3), torch.finfo(torch.float32).max / 2)
    output, step, _ = dispatch(
        {"a": range(4)}, hidden=hidden, slots=torch.tensor([[0, 1]]), weights=torch.ones(1, 2)
    )
    assert not step.failed and output.isinf().all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (common_pb2.DTYPE_BFLOAT16, 0.02),
        (common_pb2.DTYPE_INT8, 0.02),
    ],
)
@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_rows_travel_in_the_dtype_of_the_wire_and_come_back_in_that_of_the_model(
    dtype: common_pb2.Dtype, tolerance: float, combine_sum: bool
) -> None:
    workers = {"a": range(2), "b": range(2, 4)}
    output, step, links = dispatch(workers, wire_dtype=dtype, combine_sum=combine_sum)
    assert not step.failed and output.dtype == HIDDEN.dtype
    assert {request.hidden.dtype for link in links.values() for request in link.requests} == {dtype}
    torch.testing.assert_close(output, EXPECTED, rtol=tolerance, atol=tolerance)


WIRE_DTYPES = [
    common_pb2.DTYPE_FLOAT32,
    common_pb2.DTYPE_BFLOAT16,
    common_pb2.DTYPE_INT8,
]


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_a_token_alone_gets_the_bits_that_it_gets_beside_others(
    dtype: common_pb2.Dtype, combine_sum: bool
) -> None:
    workers = {"a": range(2), "b": range(2, 3), "c": range(2, 4), "c2": range(3, 4)}
    slots = torch.tensor([[0, 1, 3], [3, NO_SLOT, 2], [NO_SLOT, 2, NO_SLOT], [NO_SLOT] * 3])
    weights = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).masked_fill(slots == NO_SLOT, 0)
    answers = {"c": failing(Unavailable("gone"))}
    for token in range(4):
        outputs = []
        for copies in (1, 2):
            rows = [token] * copies
            output, step, _ = dispatch(
                workers,
                answers,
                hidden=HIDDEN[rows] / 7,
                slots=slots[rows],
                weights=weights[rows],
                wire_dtype=dtype,
                combine_sum=combine_sum,
            )
            assert not step.failed
            outputs.append(output)
        alone, beside = outputs
        assert torch.equal(alone.expand(2, -1), beside)
        expected = HIDDEN[token] / 7 * (weights[token] * (slots[token] + 1)).sum()
        torch.testing.assert_close(alone[0], expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_what_never_landed_is_no_number_of_the_memory_behind_it(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, combine_sum: bool
) -> None:
    monkeypatch.setattr(
        HostStaging, "empty", lambda _, shape, dtype: torch.full(shape, float("nan"), dtype=dtype)
    )
    output, step, _ = dispatch(
        {"a": range(1), "b": range(1, 2)},
        {"b": failing(Unavailable("gone"))},
        hidden=HIDDEN[:num_tokens],
        slots=torch.tensor([[1, 2, 0, NO_SLOT]] * num_tokens),
        weights=torch.tensor([[0.5, 0.25, 0.25, 0.0]] * num_tokens),
        combine_sum=combine_sum,
    )
    assert set(step.failed) == set(range(num_tokens))
    torch.testing.assert_close(output, HIDDEN[:num_tokens] * 0.25)


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("dtype", WIRE_DTYPES)
@pytest.mark.parametrize("combine_sum", [False, True], ids=["rows", "sum"])
def test_answers_may_be_overwritten_by_the_next_ones(
    num_tokens: int, dtype: common_pb2.Dtype, combine_sum: bool
) -> None:
    memory = bytearray(4096)

    def overwriting(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
        right = scaled_rows(request, hidden)
        memory[:] = bytes([0x7E]) * len(memory)
        memory[: right.data.nbytes] = right.data
        return WorkerAnswer(right.response, memoryview(memory)[: right.data.nbytes])

    workers = {"a": range(2), "b": range(2, 4)}
    slots = torch.tensor([[0, 3], [2, 1], [1, 2], [3, 0]])
    layer = {"hidden": HIDDEN[:num_tokens], "slots": slots[:num_tokens], "weights": WEIGHTS[:num_tokens]}
    kept, _, _ = dispatch(workers, **layer, wire_dtype=dtype, combine_sum=combine_sum)
    overwritten, step, _ = dispatch(
        workers, dict.fromkeys(workers, overwriting), **layer, wire_dtype=dtype, combine_sum=combine_sum
    )
    assert not step.failed and torch.equal(kept, overwritten)


def test_every_worker_is_told_of_its_own_part_alone() -> None:
    slots = torch.tensor([[0, 1], [0, 2], [0, 2], [0, 3]])
    workers = {
        "all": range(1),
        "few": range(1, 2),
        "some": range(2, 3),
        "gone": range(3, 4),
        "one": range(3, 4),
    }
    _, step, links = dispatch(
        workers, {"gone": failing(Unavailable("gone"))}, slots=slots, wire_dtype=common_pb2.DTYPE_INT8
    )
    assert not step.failed
    asked = {"all": [0, 1, 2, 3], "few": [0], "some": [1, 2], "gone": [3], "one": [3]}
    for slot, (worker, tokens) in zip((0, 1, 2, 3, 3), asked.items(), strict=True):
        (request,) = links[worker].requests
        header, _ = encode_rows(HIDDEN[tokens], common_pb2.DTYPE_INT8)
        assert request.hidden == header
        assert [(rows.slot, list(rows.rows)) for rows in request.experts] == [(slot, [*range(len(tokens))])]
        assert request.layer == 0 and 0 < request.timeout_ms <= 60_001


def test_quantised_rows_that_are_not_finite_are_seen_by_their_scales() -> None:
    broken = spoiled(output=lambda rows: rows * float("nan"))
    output, step, _ = dispatch(
        {"a": range(4), "b": range(4)}, {"a": broken}, wire_dtype=common_pb2.DTYPE_INT8
    )
    assert not step.failed
    torch.testing.assert_close(output, EXPECTED, rtol=0.02, atol=0.02)


def test_a_worker_that_does_not_take_the_dtype_of_the_wire_is_a_clear_error() -> None:
    refusing = failing(InvalidArgument("hidden.dtype must be one of: float32", field="hidden.dtype"))
    _, step, _ = dispatch({"a": range(4)}, {"a": refusing}, wire_dtype=common_pb2.DTYPE_INT8)
    assert isinstance(step.failed[0], FailedPrecondition)
    assert "engine.wire_dtype" in step.failed[0].message


def test_two_micro_batches_may_be_in_flight() -> None:
    epoch = make_epoch(2, NUM_SLOTS)
    pool, _ = make_pool(epoch, {"a": range(2), "b": range(2, 4)})
    dispatcher = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=60.0))
    halves = [slice(0, 2), slice(2, 4)]
    steps = [dispatcher.begin(whole(epoch), deadline_s=time.monotonic() + 60.0) for _ in halves]
    for layer in range(2):
        calls = [
            step.send(layer, HIDDEN[half], SLOTS[half], WEIGHTS[half])
            for step, half in zip(steps, halves, strict=True)
        ]
        outputs = [step.receive(call) for step, call in zip(steps, calls, strict=True)]
        torch.testing.assert_close(torch.cat(outputs), EXPECTED)


def test_the_time_of_the_slowest_worker_is_told_apart_from_the_wire() -> None:
    clock = PhaseClock()
    dispatch({"a": range(2), "b": range(2, 4)}, clock=clock)
    seconds = clock.snapshot()
    assert [round(1e6 * seconds[f"worker {part}"]) for part in ("decode", "queue", "compute", "encode")] == [
        1,
        2,
        3,
        4,
    ]
    assert all(seconds[phase] > 0 for phase in ("encode", "decode", "combine"))
