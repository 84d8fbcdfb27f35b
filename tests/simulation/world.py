"""A cluster in virtual time: the router's own pool, circuits, hedging and dispatcher over workers that only pretend.

Nothing sleeps. Whoever waits for an answer lets the time pass in which the world's events happen: workers die, freeze,
slow down, answer wrongly, restart; tables come late; the heartbeat beats. Everything follows from one seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from support.fake_links import make_epoch, scaled_rows, spoiled
from support.views import whole

from moesaic.errors import MoesaicError, Unavailable
from moesaic.routing_table import Replica, RoutingTable
from moesaic.v1 import expert_pb2
from router.dispatch.dispatcher import Dispatcher, DispatchRules, DispatchStep
from router.dispatch.heartbeat import PERIOD_S, Heartbeat
from router.dispatch.hedging import EXTRA_BURST, EXTRA_SHARE
from router.gating.gate import NO_SLOT
from router.phase_clock import PhaseClock
from router.workers.circuit import CircuitState
from router.workers.replica_pool import ReplicaPool
from router.workers.transports.base import GRPC, WorkerAnswer
from router.workers.worker_link import PendingCall, Traffic, WorkerLink

NUM_LAYERS, NUM_SLOTS, TOP_K, HIDDEN = 2, 4, 2, 3
# The slots of each worker: two replicas of either half.
PLACEMENT = (range(2), range(2), range(2, 4), range(2, 4))
# The chance that an event of a given kind happens to some worker, at each of the world's turns.
FAULTS = ("kill", "freeze", "slow", "nan", "wrong version", "short", "refuse")
TURN_S = 0.05
CALL_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 10.0
NOT_FINITE = spoiled(output=lambda rows: rows * float("nan"))
WRONG_VERSION = spoiled(versions=[b"x" * 32])
SHORT = spoiled(output=lambda rows: rows[:-1])
SPOILED = {"nan": NOT_FINITE, "wrong version": WRONG_VERSION, "short": SHORT}


class Time:
    """Virtual time and what is to happen in it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        return self.now_s

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._order), event))

    def pass_until(self, ends_s: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Lets events happen until it is over, or the time is; whether it is over."""
        while not is_over():
            if not self._events or self._events[0][0] > ends_s:
                self.now_s = max(self.now_s, ends_s)
                return False
            when_s, _, event = heapq.heappop(self._events)
            self.now_s = max(self.now_s, when_s)
            event()
        return True


@dataclass
class Worker:
    """A pretended worker: what it does to the calls that arrive."""

    name: str
    slots: range
    starts: int = 1
    alive: bool = True
    slowness: float = 1.0
    fault: str = ""
    # Until when it stands still.
    frozen_until_s: float = 0.0

    @property
    def incarnation(self) -> str:
        return f"{self.name}-{self.starts}"


@dataclass
class Flight:
    """A call on its way: its outcome once it has arrived."""

    request: expert_pb2.ComputeRequest
    hidden: torch.Tensor
    outcome: WorkerAnswer | MoesaicError | None = None


class SimulatedLink(WorkerLink):
    """The link to one incarnation of a worker."""

    def __init__(self, replica: Replica, world: World) -> None:
        self.replica = replica
        self.traffic = Traffic()
        self._world = world
        self._ids = itertools.count(1)
        self.flights: dict[int, Flight] = {}
        self.closed = False

    @property
    def lost(self) -> bool:
        return not self._world.is_running(self.replica)

    @property
    def num_in_flight(self) -> int:
        return len(self.flights)

    def send(self, request: expert_pb2.ComputeRequest, hidden: torch.Tensor) -> PendingCall:
        self._world.check_may_call(self)
        request.call_id = next(self._ids)
        self.traffic.calls += 1
        flight = self.flights[request.call_id] = Flight(request, hidden.clone())
        self._world.carry(self.replica, flight)
        return PendingCall(request, hidden, GRPC, None, 0.0)

    def wait(self, call: PendingCall, timeout_s: float) -> bool:
        flight = self.flights[call.request.call_id]
        time = self._world.time
        return time.pass_until(time() + timeout_s, lambda: flight.outcome is not None)

    def receive(self, call: PendingCall, timeout_s: float) -> WorkerAnswer:
        arrived = self.wait(call, timeout_s)
        flight = self.flights.pop(call.request.call_id)
        if not arrived:
            raise TimeoutError
        if isinstance(flight.outcome, MoesaicError):
            raise flight.outcome
        assert flight.outcome is not None
        return flight.outcome

    def abandon(self, call: PendingCall) -> None:
        del self.flights[call.request.call_id]

    def probe(
        self,
        request: expert_pb2.ComputeRequest,
        hidden: torch.Tensor,
        timeout_s: float,
        then: Callable[[Any], None],
    ) -> None:
        self._world.note_probe(self)
        flight, time = Flight(request, hidden), self._world.time
        over = [False]

        def end(outcome: Any) -> None:
            if not over[0]:
                over[0] = True
                then(outcome)

        time.at(time() + timeout_s, lambda: end(TimeoutError()))
        self._world.carry(self.replica, flight, lambda: end(flight.outcome))

    def close(self) -> None:
        self.closed = True


@dataclass
class Tally:
    """What happened in a world."""

    tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    necessary_calls: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    longest_layer_s: float = 0.0
    quarantines: int = 0
    hedged: int = 0
    calls: int = 0

    @property
    def extra_calls(self) -> int:
        return self.calls - self.necessary_calls


class World:
    """One router over four workers, and a seed's worth of misfortune."""

    def __init__(self, seed: int, *, only: str | None = None) -> None:
        """`only`: the single worker to which anything ever happens."""
        self.random = random.Random(seed)
        self._only = only
        self.time = Time()
        self.tally = Tally()
        self.epoch = make_epoch(NUM_LAYERS, NUM_SLOTS)
        self.workers = {f"w{index}": Worker(f"w{index}", slots) for index, slots in enumerate(PLACEMENT)}
        self.revision = 0
        self.links: list[SimulatedLink] = []
        self.outstanding_probes: Counter[str] = Counter()
        self.pool = ReplicaPool(connect=self._connect, clock=self.time)
        self.dispatcher = Dispatcher(self.pool, PhaseClock(), DispatchRules(CALL_TIMEOUT_S), now=self.time)
        self.heartbeat = Heartbeat(self.pool, HIDDEN, torch.float32)
        # How misfortunate this world is.
        self._fault_chance = self.random.choice((0.0, 0.05, 0.2, 0.5))
        self._usual_s = self.random.choice((0.0005, 0.004, 0.03))
        self.publish()
        self._beat()
        self.time.at(TURN_S, self._turn)

    def run(self, num_steps: int) -> Tally:
        """Some steps of generation, one after the other."""
        for _ in range(num_steps):
            self._step()
            self.time.pass_until(self.time() + self.random.choice((0.0, 0.0, 0.001, 0.05, 0.3)))
        self.tally.calls = sum(link.traffic.calls for link in self.links)
        self.tally.hedged = sum(link.traffic.hedged_calls for link in self.links)
        return self.tally

    def is_running(self, replica: Replica) -> bool:
        worker = self.workers[replica.worker]
        return worker.alive and worker.incarnation == replica.incarnation

    def check_may_call(self, link: SimulatedLink) -> None:
        """The invariant that an open circuit gets no call."""
        for one in self.pool.health():
            if one.link is link:
                assert one.circuit in (CircuitState.CLOSED, CircuitState.SUSPECT), f"a call to {one.circuit}"
                return
        raise AssertionError("a call over a link that the pool has dropped")

    def note_probe(self, link: SimulatedLink) -> None:
        assert not link.closed, "a probe over a closed link"

    def carry(self, replica: Replica, flight: Flight, then: Callable[[], None] = lambda: None) -> None:
        """Brings a call to its worker, and the answer back."""
        worker = self.workers[replica.worker]

        def arrive() -> None:
            if not self.is_running(replica):
                flight.outcome = Unavailable("gone")
            elif worker.frozen_until_s > self.time():
                self.time.at(worker.frozen_until_s + 0.0001, arrive)
                return
            elif worker.fault == "refuse":
                flight.outcome = Unavailable("the worker is draining")
            else:
                flight.outcome = SPOILED.get(worker.fault, scaled_rows)(flight.request, flight.hidden)
            then()

        # Now and then a hiccup.
        seconds = self.random.lognormvariate(0, 0.3) * self._usual_s * worker.slowness
        if self.random.random() < 0.01:
            seconds += 0.03
        self.time.at(self.time() + seconds, arrive)

    def publish(self) -> None:
        """The controller tells of the workers that run."""
        self.revision += 1
        replicas = tuple(
            Replica(
                worker.name,
                f"{worker.name}:1",
                worker.incarnation,
                frozenset(one for one in self.epoch.expert_versions if one.address.slot in worker.slots),
            )
            for worker in self.workers.values()
            if worker.alive
        )
        self.pool.update(RoutingTable(self.revision, replicas))

    def _connect(self, replica: Replica) -> WorkerLink:
        link = SimulatedLink(replica, self)
        self.links.append(link)
        return link

    def _beat(self) -> None:
        self.heartbeat.beat()
        self.time.at(self.time() + PERIOD_S, self._beat)

    def _turn(self) -> None:
        """Something may happen to one worker that is well."""
        if self.random.random() < self._fault_chance:
            worker = self.workers[self._only or self.random.choice(list(self.workers))]
            is_well = worker.alive and not worker.fault and worker.slowness == 1.0
            if is_well and worker.frozen_until_s <= self.time():
                self._harm(worker, self.random.choice(FAULTS))
        if self.random.random() < 0.2:
            self.pool.prune()
        self.time.at(self.time() + TURN_S, self._turn)

    def _harm(self, worker: Worker, fault: str) -> None:
        self.tally.faults[fault] += 1
        seconds = self.random.choice((0.1, 0.5, 2.0, 5.0))
        if fault == "kill":
            worker.alive = False
            # The table tells of it late, and so of its return.
            self.time.at(self.time() + self.random.choice((0.01, 0.5)), self.publish)
            self.time.at(self.time() + seconds, lambda: self._restart(worker))
        elif fault == "freeze":
            worker.frozen_until_s = self.time() + seconds
        else:
            if fault == "slow":
                worker.slowness = 10.0
            else:
                worker.fault = fault
            self.time.at(self.time() + seconds, lambda: self._heal(worker))

    def _restart(self, worker: Worker) -> None:
        worker.starts += 1
        worker.alive = True
        self._heal(worker)
        self.time.at(self.time() + self.random.choice((0.0, 0.3)), self.publish)

    def _heal(self, worker: Worker) -> None:
        worker.fault, worker.slowness = "", 1.0

    def _step(self) -> None:
        """All layers of one micro-batch, whose answer is known: expert s multiplies by s + 1."""
        num_tokens = self.random.choice((1, 1, 4, 8, 100))
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
        ranked = torch.rand(num_tokens, NUM_SLOTS, generator=generator).topk(TOP_K)
        slots, weights = ranked.indices, ranked.values.softmax(-1)
        if self.random.random() < 0.1:
            slots = slots.masked_fill(torch.rand(slots.shape, generator=generator) < 0.3, NO_SLOT)
        weights = weights.masked_fill(slots == NO_SLOT, 0)
        step = self.dispatcher.begin(whole(self.epoch), deadline_s=self.time() + REQUEST_TIMEOUT_S)
        for layer in range(NUM_LAYERS):
            self._layer(step, layer, hidden, slots, weights)
        step.finish()
        self.tally.tokens += num_tokens
        self.tally.failed.update(error.reason for error in step.failed.values())

    def _layer(
        self, step: DispatchStep, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> None:
        step.failed.clear()
        started_s = self.time()
        call = step.send(layer, hidden, slots, weights)
        self.tally.necessary_calls += len(call.waves[0].calls)
        if self.random.random() < 0.01:
            step.abandon()
            assert not call.in_flight, "a call that is given up is in flight"
            step._in_flight.clear()
            return
        output = step.receive(call)
        self.tally.longest_layer_s = max(self.tally.longest_layer_s, self.time() - started_s)
        expected = hidden * (weights * (slots + 1)).sum(dim=1, keepdim=True)
        right = [token for token in range(len(hidden)) if token not in step.failed]
        assert torch.allclose(output[right], expected[right], rtol=1e-4, atol=1e-5), "wrong rows were used"
        assert output.isfinite().all(), "values that are not finite left the layer"
        assert not call.in_flight, "a call outlives its layer"
        assert not any(link.flights for link in self.links), "a link still waits for a call"
        used = Counter(group for one in call.answered for group in one.rows.groups)
        assert all(count == 1 for count in used.values()), "an answer was combined twice"
        assert used.keys() | call.missing.keys() == set(range(len(call.groups.slots))), "rows were lost"
        assert not used.keys() & call.missing.keys(), "rows are both there and missing"


def check(world: World) -> None:
    """What holds of every world that has run."""
    tally = world.tally
    assert tally.extra_calls <= EXTRA_SHARE * tally.necessary_calls + EXTRA_BURST, "too many extra calls"
    assert tally.longest_layer_s <= 2 * CALL_TIMEOUT_S + 0.1, "a layer outlasted its deadline"
