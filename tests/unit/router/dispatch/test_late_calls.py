"""Calls that are late are asked of another replica, and the first right answer counts."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from support.fake_links import Answerer, FakeLink, failing, make_epoch, scaled_rows, spoiled
from support.views import whole

from moesaic.errors import Unavailable
from moesaic.routing_table import Replica, RoutingTable
from router.dispatch.dispatcher import Dispatcher, DispatchRules, DispatchStep
from router.dispatch.hedging import HEDGE_BURST, UNKNOWN_DELAY_S
from router.phase_clock import PhaseClock
from router.workers.circuit import CircuitState
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import WorkerAnswer
from router.workers.worker_link import PendingCall

HIDDEN = torch.arange(6.0).view(2, 3) + 1
SLOTS = torch.tensor([[0, 1], [2, 3]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
EXPECTED = HIDDEN * (WEIGHTS * (SLOTS + 1)).sum(dim=1, keepdim=True)
NEVER_S = 1e9


class TimedLink(FakeLink):
    """Its answers take a time; whoever waits lets it pass."""

    def __init__(self, replica: Replica, answer: Answerer, takes_s: float, rig: Rig) -> None:
        super().__init__(replica, answer)
        self.takes_s = takes_s
        self._rig = rig
        self._arrives_s: dict[int, float] = {}

    def send(self, request, hidden):  # type: ignore[no-untyped-def]
        call = super().send(request, hidden)
        self._arrives_s[call.request.call_id] = self._rig.now_s + self.takes_s
        return call

    def wait(self, call: PendingCall, timeout_s: float) -> bool:
        arrives_s = self._arrives_s[call.request.call_id]
        self._rig.now_s = max(self._rig.now_s, min(arrives_s, self._rig.now_s + timeout_s))
        return arrives_s <= self._rig.now_s

    def receive(self, call: PendingCall, timeout_s: float) -> WorkerAnswer:
        if not self.wait(call, timeout_s):
            raise TimeoutError
        return super().receive(call, timeout_s)


class Rig:
    """A dispatcher over workers whose answers take as long as is told."""

    def __init__(
        self,
        takes_s: Mapping[str, float],
        answers: Mapping[str, Answerer] | None = None,
        *,
        slots: Mapping[str, range] | None = None,
    ) -> None:
        self.now_s = 100.0
        self.links: dict[str, TimedLink] = {}
        self.epoch = make_epoch(1, 4)

        def connect(replica: Replica) -> FakeLink:
            name = replica.worker
            answer = (answers or {}).get(name, scaled_rows)
            self.links[name] = TimedLink(replica, answer, takes_s[name], self)
            return self.links[name]

        self.pool = ReplicaPool(connect=connect, clock=lambda: self.now_s)
        holds = slots or dict.fromkeys(takes_s, range(4))
        self.pool.update(
            RoutingTable(
                1,
                tuple(
                    Replica(
                        name,
                        f"{name}:1",
                        f"{name}-1",
                        frozenset(
                            one for one in self.epoch.expert_versions if one.address.slot in holds[name]
                        ),
                    )
                    for name in takes_s
                ),
            )
        )
        self.dispatcher = Dispatcher(
            self.pool, PhaseClock(), DispatchRules(call_timeout_s=5.0), now=lambda: self.now_s
        )

    def compute(self) -> tuple[torch.Tensor, DispatchStep]:
        step = self.dispatcher.begin(whole(self.epoch), deadline_s=self.now_s + 10.0)
        return step.compute(0, HIDDEN, SLOTS, WEIGHTS), step

    def calls(self) -> dict[str, int]:
        return {name: len(link.requests) for name, link in self.links.items()}

    def circuit(self, name: str) -> CircuitState:
        return next(one.circuit for one in self.pool.health() if one.link is self.links[name])


def test_a_replica_that_does_not_answer_costs_a_moment_once() -> None:
    rig = Rig({"a": NEVER_S, "b": 0.002})
    output, step = rig.compute()
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and rig.now_s - 100.0 < UNKNOWN_DELAY_S + 0.01
    assert rig.links["a"].abandoned == [1] and rig.circuit("a") is CircuitState.SUSPECT
    for _ in range(10):
        rig.compute()
    assert rig.calls() == {"a": 1, "b": 11}
    assert rig.links["a"].traffic.hedged_calls == 1


def test_the_late_answer_counts_where_it_is_the_first() -> None:
    rig = Rig({"a": UNKNOWN_DELAY_S + 0.005, "b": 5.0})
    output, step = rig.compute()
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and rig.links["b"].abandoned == [1]
    assert rig.circuit("a") is rig.circuit("b") is CircuitState.CLOSED


def test_no_call_is_hedged_that_is_as_quick_as_ever() -> None:
    rig = Rig({"a": 0.002, "b": 0.003})
    for _ in range(50):
        rig.compute()
    assert sum(rig.calls().values()) == 50


def test_a_late_call_is_divided_between_replicas_that_hold_its_parts() -> None:
    rig = Rig({"a": NEVER_S, "b": 0.002, "c": 0.003}, slots={"a": range(4), "b": range(2), "c": range(2, 4)})
    for link in (rig.links["b"], rig.links["c"]):
        link.in_flight = 1
    output, step = rig.compute()
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and rig.calls() == {"a": 1, "b": 1, "c": 1}


def test_a_late_call_of_which_a_part_has_no_other_replica_is_waited_for() -> None:
    rig = Rig({"a": 1.0, "b": 0.002}, slots={"a": range(4), "b": range(2)})
    rig.links["b"].in_flight = 1
    output, step = rig.compute()
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and rig.calls() == {"a": 1, "b": 0}


def test_an_expert_that_one_worker_alone_holds_takes_no_hedge_from_the_others() -> None:
    rig = Rig({"a": NEVER_S, "b": 0.002, "c": 0.002}, slots={"a": range(3), "b": range(3), "c": range(3, 4)})
    output, step = rig.compute()
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and rig.now_s - 100.0 < UNKNOWN_DELAY_S + 0.01
    assert rig.calls() == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    "broken",
    [failing(Unavailable("gone")), spoiled(versions=[b"x" * 32]), spoiled(output=lambda rows: rows[:-1])],
    ids=["gone", "version", "shape"],
)
def test_a_hedge_that_fails_leaves_the_late_answer_in_its_place(broken: Answerer) -> None:
    rig = Rig({"a": 1.0, "b": 0.002}, {"b": broken})
    output, step = rig.compute()
    torch.testing.assert_close(output, EXPECTED)
    assert not step.failed and rig.now_s - 100.0 == pytest.approx(1.0, abs=0.01)


def test_a_hedge_that_is_not_finite_is_not_used() -> None:
    rig = Rig({"a": NEVER_S, "b": 0.002, "c": 0.002}, {"b": spoiled(output=lambda rows: rows * float("nan"))})
    for _ in range(3):
        output, step = rig.compute()
        torch.testing.assert_close(output, EXPECTED)
        assert not step.failed


def test_hedges_are_few_however_many_calls_are_late() -> None:
    rig = Rig({"a": 1.0, "b": 1.0})
    for _ in range(100):
        rig.compute()
    # After the first calls of their kind so long is no longer late.
    assert sum(rig.calls().values()) <= 100 + 2 * HEDGE_BURST


def test_two_replicas_that_stand_still_end_with_the_call_s_own_time() -> None:
    rig = Rig({"a": NEVER_S, "b": NEVER_S})
    _, step = rig.compute()
    assert set(step.failed) == {0, 1} and rig.now_s - 100.0 <= 10.0
    assert rig.circuit("a") is rig.circuit("b") is CircuitState.OPEN
    started_s = rig.now_s
    _, step = rig.compute()
    assert {error.reason for error in step.failed.values()} == {"NO_REPLICA"} and rig.now_s == started_s


def test_wrong_numbers_that_a_twin_refutes_end_in_quarantine() -> None:
    rig = Rig({"a": 0.001, "b": 0.001}, {"a": spoiled(output=lambda rows: rows * float("nan"))})
    for _ in range(10):
        rig.pool.note_answer(rig.links["a"], 1, 0.001)  # a probe that it passes
        output, step = rig.compute()
        torch.testing.assert_close(output, EXPECTED)
        assert not step.failed
    assert rig.circuit("a") is CircuitState.QUARANTINED and rig.circuit("b") is CircuitState.CLOSED


def test_a_version_that_is_nowhere_finite_puts_no_replica_into_quarantine() -> None:
    nan = spoiled(output=lambda rows: rows * float("nan"))
    rig = Rig({"a": 0.001, "b": 0.001}, {"a": nan, "b": nan})
    for _ in range(10):
        _, step = rig.compute()
        assert {error.reason for error in step.failed.values()} == {"NOT_FINITE"}
    assert rig.circuit("a") is rig.circuit("b") is CircuitState.SUSPECT
