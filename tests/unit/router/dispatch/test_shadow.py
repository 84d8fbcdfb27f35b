"""Shadows: compared, never used, never waited for, and none where there is much to do."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import pytest
import torch
from support.fake_links import Answerer, FakeLink, failing, make_epoch, make_pool, scaled_rows, spoiled

from moesaic.epoch import Epoch, ExpertAddress
from moesaic.errors import Unavailable
from moesaic.routing_table import Replica, RoutingTable
from moesaic.v1 import expert_pb2
from moesaic.wire.tensors import data_of, decode_rows, encode_rows
from router.dispatch.dispatcher import Dispatcher, DispatchRules
from router.dispatch.shadow import BUSY_CALLS, MAX_TOKENS, RESTING_STEPS, ShadowedRows, ShadowTally
from router.gating.model_view import ModelView, ViewRows
from router.phase_clock import PhaseClock
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import WorkerAnswer

NUM_SLOTS = 4
HIDDEN = torch.arange(12, dtype=torch.float32).view(4, 3) + 1
SLOTS = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 2]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]])
EXPECTED = HIDDEN * (WEIGHTS * (SLOTS + 1)).sum(dim=1, keepdim=True)


def negated(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
    """Experts that give the opposite."""
    right = scaled_rows(request, hidden)
    header, wire = encode_rows(-decode_rows(right.response.output, right.output), request.hidden.dtype)
    right.response.output.CopyFrom(header)
    return WorkerAnswer(right.response, data_of(wire))


class Rig:
    """An epoch, and another one with other versions in some slots, which a worker of its own holds."""

    def __init__(self, swapped: Iterable[int], shadow: Answerer = negated, **rules: bool) -> None:
        self.epoch = make_epoch(2, NUM_SLOTS)
        new = {ExpertAddress(layer, slot): b"new!" * 8 for slot in swapped for layer in range(2)}
        self.other = Epoch.of("tiny", {**self.epoch.versions, **new})
        self.links: dict[str, FakeLink] = {}
        answers = {"old": scaled_rows, "new": shadow}

        def connect(replica: Replica) -> FakeLink:
            self.links[replica.worker] = FakeLink(replica, answers[replica.worker])
            return self.links[replica.worker]

        pool = ReplicaPool(connect=connect)
        old, added = self.epoch.expert_versions, self.other.expert_versions - self.epoch.expert_versions
        replicas = (Replica("old", "old:1", "old-1", old), Replica("new", "new:1", "new-1", added))
        pool.update(RoutingTable(1, replicas))
        self.dispatcher = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=5.0, **rules))
        self.tally = ShadowTally()

    def step(
        self, tokens: Iterable[int] = range(4), hidden: torch.Tensor = HIDDEN, slots: torch.Tensor = SLOTS
    ) -> torch.Tensor:
        """One layer; the shadows of a step are compared at the end of the next one."""
        shadowed = ShadowedRows(ModelView.plain(self.other), frozenset(tokens), self.tally)
        views = (ViewRows(ModelView.plain(self.epoch), 0, len(hidden)),)
        step = self.dispatcher.begin(views, deadline_s=time.monotonic() + 5.0, shadowed=shadowed)
        weights = torch.ones(slots.shape) if len(hidden) != len(WEIGHTS) else WEIGHTS
        output = step.compute(0, hidden, slots, weights)
        step.finish()
        assert not step.failed
        return output

    def asked(self) -> list[expert_pb2.ComputeRequest]:
        return self.links["new"].requests


def test_rows_of_versions_that_differ_are_compared_and_the_layer_is_what_it_was() -> None:
    rig = Rig([1, 3])
    for _ in range(2):
        torch.testing.assert_close(rig.step(), EXPECTED)
    request = rig.asked()[0]
    assert request.epoch == rig.other.id
    assert [(group.slot, group.version) for group in request.experts] == [(1, b"new!" * 8), (3, b"new!" * 8)]
    assert (rig.tally.rows, rig.tally.min_cosine, rig.tally.mean_cosine) == (4, -1.0, -1.0)
    # Token 1 has the hidden state [4, 5, 6] and slot 3, token 2 [7, 8, 9]; expert s multiplies by s + 1.
    assert rig.tally.max_difference == 2 * 9 * 4


def test_only_the_sequences_that_are_shadowed_count_and_equal_answers_are_equal() -> None:
    rig = Rig([0], shadow=scaled_rows)
    for _ in range(2):
        rig.step(tokens=[2, 3])
    assert [list(group.rows) for group in rig.asked()[0].experts] == [[0]]
    assert (rig.tally.rows, rig.tally.max_difference) == (1, 0.0)
    assert rig.tally.min_cosine == pytest.approx(1.0)


def test_where_nothing_differs_nobody_is_asked() -> None:
    rig = Rig([])
    rig.step()
    rig = Rig([0])
    rig.step(tokens=[1])
    assert not rig.asked()


def test_a_shadow_that_fails_is_none_and_costs_its_worker_nothing() -> None:
    for broken in (failing(Unavailable("gone")), failing(TimeoutError()), spoiled(epoch="another")):
        rig = Rig([0], shadow=broken)
        for _ in range(3):
            torch.testing.assert_close(rig.step(), EXPECTED)
        assert rig.tally.rows == 0 and rig.links["new"].traffic.failed_calls == 0


def test_after_a_slow_answer_nothing_is_shadowed_for_some_steps() -> None:
    rig = Rig([0], shadow=failing(TimeoutError()))
    for _ in range(RESTING_STEPS + 2):
        rig.step()
    num_asked = len(rig.asked())
    assert num_asked == 2
    rig.step()
    assert len(rig.asked()) == num_asked + 1


def test_a_busy_worker_gets_none_and_a_long_prompt_few() -> None:
    rig = Rig([0])
    rig.links["new"].in_flight = BUSY_CALLS
    rig.step()
    assert not rig.asked()
    rig.links["new"].in_flight = 0
    hidden = torch.ones(MAX_TOKENS + 20, 3)
    rig.step(range(len(hidden)), hidden, torch.tensor([[0, 1]] * len(hidden)))
    assert len(rig.asked()[0].experts[0].rows) == MAX_TOKENS


def test_sums_of_several_experts_are_not_compared() -> None:
    rig = Rig([0], combine_sum=True)
    rig.step()
    assert not rig.asked()


def test_a_row_that_is_not_finite_is_as_far_away_as_can_be() -> None:
    tally = ShadowTally()
    tally.compare(torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0], [1.0, math.nan, 1.0]]))
    assert (tally.rows, tally.min_cosine, tally.max_difference) == (2, -1.0, math.inf)
    assert tally.mean_cosine == pytest.approx(0.0, abs=1e-6)


def test_what_one_version_computes_wrong_harms_no_sequence_of_another_epoch() -> None:
    """Both versions of a slot are asked of one worker in one call, and no other replica is there."""
    epoch = make_epoch(2, 2)
    other = Epoch.of("tiny", {**epoch.versions, ExpertAddress(0, 0): b"bad!" * 8})

    def nonsense(request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> WorkerAnswer:
        right = scaled_rows(request, hidden)
        rows = decode_rows(right.response.output, right.output).clone()
        start = 0
        for group in request.experts:
            if group.version == b"bad!" * 8:
                rows[start : start + len(group.rows)] = math.nan
            start += len(group.rows)
        header, wire = encode_rows(rows, request.hidden.dtype)
        right.response.output.CopyFrom(header)
        return WorkerAnswer(right.response, data_of(wire))

    pool, links = make_pool(epoch, {"a": range(2)}, {"a": nonsense})
    held = epoch.expert_versions | other.expert_versions
    pool.update(RoutingTable(10, (Replica("a", "a:1", "a-1", held),)))
    views = (ViewRows(ModelView.plain(epoch), 0, 2), ViewRows(ModelView.plain(other), 2, 4))
    dispatcher = Dispatcher(pool, PhaseClock(), DispatchRules(call_timeout_s=5.0))
    step = dispatcher.begin(views, deadline_s=time.monotonic() + 5.0)
    slots, weights = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]]), torch.ones(4, 2)
    output = step.compute(0, HIDDEN, slots, weights)
    assert {token: error.reason for token, error in step.failed.items()} == dict.fromkeys(
        (2, 3), "NOT_FINITE"
    )
    torch.testing.assert_close(output[:2], HIDDEN[:2] * 3)
    assert output.isfinite().all()
    # The worker is not silent: the next layer is computed by it.
    torch.testing.assert_close(step.compute(1, HIDDEN, slots, weights), HIDDEN * 3)
    assert set(step.failed) == {2, 3} and len(links["a"].requests) == 2
