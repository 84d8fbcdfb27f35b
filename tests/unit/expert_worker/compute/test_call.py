"""Whatever a message can have wrong is refused by its field, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.expert_calls import compute_request, experts_of, versions_of
from support.wire_tensors import to_wire

from expert_worker.compute.call import ExpertCall, read_call
from expert_worker.experts.store import ExpertStore, HeldExpert
from moesaic.epoch import ExpertAddress
from moesaic.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, MoesaicError
from moesaic.families import MoeModel
from moesaic.v1 import common_pb2, expert_pb2
from moesaic.wire.messages import decode_request

Edit = Callable[[expert_pb2.ComputeRequest], Any]


@pytest.fixture
def request_of_two(store: ExpertStore) -> expert_pb2.ComputeRequest:
    return compute_request(torch.ones(4, 32), {0: [0, 2], 2: [1, 2, 3]}, versions_of(store), layer=1)


@pytest.fixture
def read(store: ExpertStore, model: MoeModel) -> Callable[[expert_pb2.ComputeRequest], ExpertCall]:
    return lambda request: read_call(
        decode_request(request.SerializeToString()), model=model, store=store, max_rows=8, now_s=100.0
    )


def test_a_good_request_becomes_a_call(
    read: Callable[..., ExpertCall], request_of_two: expert_pb2.ComputeRequest, store: ExpertStore
) -> None:
    call = read(request_of_two)
    assert (call.layer, call.num_rows, call.combine_sum, call.deadline_s) == (1, 5, False, 110.0)
    assert (call.counts, call.rows.tolist(), call.weights) == ([2, 3], [0, 2, 1, 2, 3], None)
    assert torch.equal(call.hidden, torch.ones(4, 32))
    held = experts_of(store)
    assert call.experts == [held[1, 0], held[1, 2]]  # type: ignore[index]


def test_a_slot_may_occur_once_for_each_of_its_versions_and_above_those_of_the_model(
    store: ExpertStore, model: MoeModel
) -> None:
    """As two epochs in one batch ask for it, one of which has a slot more."""
    two, held = ExpertStore(), experts_of(store)
    places = [((1, 0), b"1"), ((1, 0), b"2"), ((1, 4), b"1")]
    for (address, tag), expert in zip(places, held.values(), strict=False):
        two.add(ExpertAddress(*address), HeldExpert(tag * 32, expert))
    request = compute_request(torch.ones(4, 32), {}, {}, layer=1)
    for (address, tag), row in zip(places, (0, 3, 0), strict=True):
        request.experts.add(slot=address[1], version=tag * 32, rows=[row])
    call = read_call(
        decode_request(request.SerializeToString()), model=model, store=two, max_rows=8, now_s=0.0
    )
    assert call.experts == list(held.values())[:3]
    assert call.rows.tolist() == [0, 3, 0]


def test_a_layer_without_experts_is_refused(
    model: MoeModel, store: ExpertStore, request_of_two: expert_pb2.ComputeRequest
) -> None:
    """The first layers of many models are dense, and the router's."""
    sparse = replace(model, experts={0: model.experts[0]})
    with pytest.raises(InvalidArgument, match="layer 1 has no experts") as caught:
        framed = decode_request(request_of_two.SerializeToString())
        read_call(framed, model=sparse, store=store, max_rows=8, now_s=0.0)
    assert caught.value.field == "layer"


def test_a_request_for_sums_carries_one_weight_per_row(
    read: Callable[..., ExpertCall], store: ExpertStore
) -> None:
    request = compute_request(torch.ones(2, 32), {0: [0, 1]}, versions_of(store), weights={0: [0.25, 0.75]})
    weights = read(request).weights
    assert weights is not None and weights.tolist() == [0.25, 0.75]


def set_rows(request: expert_pb2.ComputeRequest, rows: list[int]) -> None:
    request.experts[1].rows[:] = rows


@pytest.mark.parametrize(
    ("field", "edit"),
    [
        ("layer", lambda r: setattr(r, "layer", 2)),
        ("combine", lambda r: setattr(r, "combine", expert_pb2.COMBINE_UNSPECIFIED)),
        ("combine", lambda r: setattr(r, "combine", 7)),
        ("hidden.dtype", lambda r: r.ClearField("hidden")),
        ("hidden.dtype", lambda r: setattr(r.hidden, "dtype", common_pb2.DTYPE_UNSPECIFIED)),
        ("hidden.shape", lambda r: r.hidden.CopyFrom(to_wire(torch.ones(4, 31)))),
        ("hidden.shape", lambda r: r.hidden.CopyFrom(to_wire(torch.ones(32)))),
        ("hidden.shape", lambda r: r.hidden.CopyFrom(to_wire(torch.ones(9, 32)))),
        ("hidden.shape", lambda r: r.hidden.CopyFrom(to_wire(torch.ones(0, 32)))),
        ("hidden.data", lambda r: setattr(r.hidden, "data", r.hidden.data[:-1])),
        ("hidden.data", lambda r: setattr(r.hidden, "data", r.hidden.data + b"x")),
        ("experts", lambda r: r.ClearField("experts")),
        ("experts", lambda r: r.experts[1].CopyFrom(r.experts[0])),
        ("experts[1].rows", lambda r: set_rows(r, [])),
        ("experts[1].rows", lambda r: set_rows(r, [4])),
        ("experts[1].rows", lambda r: set_rows(r, [2, 1])),
        ("experts[1].rows", lambda r: set_rows(r, [1, 1])),
        ("experts[1].rows", lambda r: set_rows(r, [2**32 - 1])),
        ("experts[1].weights", lambda r: r.experts[1].weights.extend([1.0, 1.0, 1.0])),
    ],
)
def test_a_wrong_request_is_refused_by_field(
    read: Callable[..., ExpertCall], request_of_two: expert_pb2.ComputeRequest, field: str, edit: Edit
) -> None:
    edit(request_of_two)
    with pytest.raises(InvalidArgument) as caught:
        read(request_of_two)
    assert caught.value.field == field


@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 3, [1.0, float("nan")], [float("inf"), 1.0]])
def test_weights_of_a_sum_must_be_finite_and_one_per_row(
    read: Callable[..., ExpertCall], store: ExpertStore, weights: list[float]
) -> None:
    request = compute_request(torch.ones(2, 32), {0: [0, 1]}, versions_of(store), weights={0: weights})
    with pytest.raises(InvalidArgument) as caught:
        read(request)
    assert caught.value.field == "experts[0].weights"


@pytest.mark.parametrize(
    ("reason", "edit"),
    [
        ("NOT_HELD", lambda r: setattr(r.experts[1], "slot", 3)),
        ("NOT_HELD", lambda r: setattr(r.experts[1], "slot", 4)),
        ("WRONG_VERSION", lambda r: setattr(r.experts[1], "version", bytes(32))),
        ("WRONG_VERSION", lambda r: r.experts[1].ClearField("version")),
        ("WRONG_VERSION", lambda r: setattr(r, "layer", 0)),
    ],
)
def test_an_expert_that_is_not_held_so_is_refused_and_not_guessed(
    read: Callable[..., ExpertCall], request_of_two: expert_pb2.ComputeRequest, reason: str, edit: Edit
) -> None:
    edit(request_of_two)
    with pytest.raises(FailedPrecondition) as caught:
        read(request_of_two)
    assert caught.value.reason == reason


def test_a_caller_who_waits_no_more_is_refused(
    read: Callable[..., ExpertCall], request_of_two: expert_pb2.ComputeRequest
) -> None:
    request_of_two.timeout_ms = 0
    with pytest.raises(DeadlineExceeded):
        read(request_of_two)


def test_no_random_message_raises_anything_but_a_typed_error(
    read: Callable[..., ExpertCall], request_of_two: expert_pb2.ComputeRequest
) -> None:
    whole = request_of_two.SerializeToString()
    for position in range(0, len(whole), 3):
        changed = whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
        request = expert_pb2.ComputeRequest()
        try:
            request.ParseFromString(changed)
        except Exception:
            continue  # gRPC refuses it before it is a call
        try:
            read(request)
        except MoesaicError as error:
            assert error.message
