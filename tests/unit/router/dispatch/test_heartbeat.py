"""What a router's heartbeat asks of replicas, and what it makes of their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fake_links import FakeLink, digest, make_epoch, scaled_rows, spoiled

from moesaic.epoch import ExpertAddress, ExpertVersion
from moesaic.errors import FailedPrecondition, MoesaicError, Overloaded, Unavailable
from moesaic.routing_table import Replica, RoutingTable
from moesaic.v1 import common_pb2, expert_pb2
from router.dispatch.heartbeat import Heartbeat
from router.workers.circuit import IDLE_S, WRONG_ANSWERS, CircuitState
from router.workers.replica_pool import ReplicaPool

EPOCH = make_epoch(1, 2)
NAN = spoiled(output=lambda rows: rows * float("nan"))


class ProbedLink(FakeLink):
    """Answers probes as it answers calls."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self.probes: list[expert_pb2.ComputeRequest] = []

    def probe(
        self,
        request: expert_pb2.ComputeRequest,
        hidden: torch.Tensor,
        timeout_s: float,
        then: Callable[[Any], None],
    ) -> None:
        self.probes.append(request)
        try:
            then(self.answer(request, hidden))
        except (MoesaicError, TimeoutError) as error:
            then(error)


class Rig:
    """A pool of one replica, and its heartbeat without its thread."""

    def __init__(self, wire_dtype: common_pb2.Dtype | None = None) -> None:
        self.now_s = 0.0
        replica = Replica("a", "a:1", "a-1", EPOCH.expert_versions)
        self.link = ProbedLink(replica)
        self.pool = ReplicaPool(connect=lambda _: self.link, clock=lambda: self.now_s)
        self.pool.update(RoutingTable(1, (replica,)))
        self.heartbeat = Heartbeat(self.pool, 3, torch.float32, wire_dtype)

    def beat(self, num_beats: int = 1) -> CircuitState:
        for _ in range(num_beats):
            self.now_s += IDLE_S
            self.heartbeat.beat()
        return self.pool.health()[0].circuit


@pytest.mark.parametrize("wire_dtype", [None, common_pb2.DTYPE_BFLOAT16, common_pb2.DTYPE_INT8])
def test_an_idle_replica_computes_one_row_of_one_of_its_experts(wire_dtype: common_pb2.Dtype | None) -> None:
    rig = Rig(wire_dtype)
    assert rig.beat(3) is CircuitState.CLOSED
    (request, _, _) = rig.link.probes
    assert list(request.hidden.shape) == [1, 3] and request.timeout_ms
    (expert,) = request.experts
    assert expert.version == digest(0, expert.slot) and list(expert.rows) == [0]


@pytest.mark.parametrize("sign", [Overloaded("full"), FailedPrecondition("another version")])
def test_a_refusal_is_a_sign_of_life(sign: MoesaicError) -> None:
    rig = Rig()
    rig.link.answer = _raising(sign)
    assert rig.beat(5) is CircuitState.CLOSED


@pytest.mark.parametrize("error", [Unavailable("gone"), TimeoutError()])
def test_missed_beats_open_the_circuit_and_an_answered_one_closes_it(error: Exception) -> None:
    rig = Rig()
    rig.link.answer = _raising(error)
    assert rig.beat(10) is CircuitState.OPEN
    rig.link.answer = scaled_rows
    assert rig.beat() is CircuitState.CLOSED


def test_wrong_answers_to_probes_are_wrong_answers() -> None:
    rig = Rig()
    rig.link.answer = spoiled(versions=[b"x" * 32])
    assert rig.beat(WRONG_ANSWERS) is CircuitState.QUARANTINED


def test_numbers_that_are_not_finite_count_only_where_another_replica_had_finite_ones() -> None:
    rig = Rig()
    rig.link.answer = NAN
    assert rig.beat(5) is CircuitState.CLOSED
    rig.pool.note_wrong(rig.link, "not finite", ExpertVersion(ExpertAddress(0, 1), digest(0, 1)))
    assert rig.beat(WRONG_ANSWERS) is CircuitState.QUARANTINED
    assert rig.link.probes[-1].experts[0].slot == 1


def test_it_ends_when_it_is_told_even_if_it_never_began() -> None:
    Rig().heartbeat.stop()
    heartbeat = Rig().heartbeat
    heartbeat.start()
    heartbeat.stop()


def _raising(error: Exception) -> Callable[..., Any]:
    def answer(*_: object) -> Any:
        raise error

    return answer
