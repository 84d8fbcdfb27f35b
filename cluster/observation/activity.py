"""The work of a cluster between two observations. Pure.

Counters grow from the start of a process. Where a process was restarted in between, everything that it has
counted is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cluster.observation.observer import Observation, ObservedProcess
from moesaic.v1 import control_pb2, expert_pb2, inference_pb2

_RouterStats = inference_pb2.GetRouterStatsResponse
_WorkerStats = expert_pb2.GetWorkerStatsResponse
_Traffic = inference_pb2.WorkerTraffic


@dataclass(frozen=True, slots=True)
class RouterActivity:
    """The work of one router, and its present load."""

    name: str
    address: str
    state: control_pb2.ProcessState
    answers: bool
    steps: int
    overlapped_steps: int
    prompt_tokens: int
    generated_tokens: int
    prefix_lookup_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    running_sequences: int
    waiting_sequences: int
    parked_sequences: int
    kv_blocks_used: int
    kv_blocks_total: int
    phases_s: dict[str, float]

    @property
    def prefix_hit_share(self) -> float | None:
        """The share of looked-up prompt tokens found in the prefix cache; None without a lookup."""
        return self.prefix_hit_tokens / self.prefix_lookup_tokens if self.prefix_lookup_tokens else None


@dataclass(frozen=True, slots=True)
class WorkerActivity:
    """The work of one worker, and its traffic with all routers.

    `rows`: (token, expert) pairs. Each router reports the latency of its last calls; this is the slowest
    router's.
    """

    name: str
    address: str
    state: control_pb2.ProcessState
    answers: bool
    detail: str
    rows: int
    calls: int
    busy_s: float
    sent_bytes: int
    received_bytes: int
    failed_calls: int
    # Failed calls since the start of the routers.
    all_failed_calls: int
    # Calls that another replica answered first because this one was late.
    hedged_calls: int
    # What routers make of it, other than "closed": why it is not called like any other.
    circuits: tuple[str, ...]
    transports: tuple[str, ...]
    call_p50_us: int
    call_p99_us: int


@dataclass(frozen=True, slots=True)
class Activity:
    """What every router and worker did during the same seconds; all zeros for one that did not answer."""

    seconds: float
    routers: tuple[RouterActivity, ...]
    workers: tuple[WorkerActivity, ...]

    @property
    def steps(self) -> int:
        return self._sum(lambda router: router.steps)

    @property
    def prompt_tokens(self) -> int:
        return self._sum(lambda router: router.prompt_tokens)

    @property
    def generated_tokens(self) -> int:
        return self._sum(lambda router: router.generated_tokens)

    @property
    def calls(self) -> int:
        return sum(worker.calls for worker in self.workers)

    @property
    def wire_bytes(self) -> int:
        """Bytes sent and received."""
        return sum(worker.sent_bytes + worker.received_bytes for worker in self.workers)

    @property
    def prefix_hit_share(self) -> float | None:
        """The share over the lookups of all routers; None when there was none."""
        looked_up = self._sum(lambda router: router.prefix_lookup_tokens)
        return self._sum(lambda router: router.prefix_hit_tokens) / looked_up if looked_up else None

    @property
    def phases_s(self) -> dict[str, float]:
        """The phases of all routers together, in the order in which the routers report them."""
        total: dict[str, float] = {}
        for router in self.routers:
            for phase, seconds in router.phases_s.items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total

    def busy_share(self, worker: WorkerActivity) -> float:
        return worker.busy_s / self.seconds if self.seconds > 0 else 0.0

    def rate(self, amount: float) -> float:
        """`amount` per second."""
        return amount / self.seconds if self.seconds > 0 else 0.0

    def _sum(self, of: Callable[[RouterActivity], int]) -> int:
        return sum(map(of, self.routers))


def activity_between(before: Observation, after: Observation) -> Activity:
    """The work from `before` to `after`."""
    return Activity(
        seconds=after.at_s - before.at_s,
        routers=tuple(_router(process, before, after) for process in after.processes if process.is_router),
        workers=tuple(
            _worker(process, before, after) for process in after.processes if not process.is_router
        ),
    )


def _router(process: ObservedProcess, before: Observation, after: Observation) -> RouterActivity:
    old, new = _pair(before.routers, after.routers, process.name, _RouterStats(), after.at_s - before.at_s)
    old_s = {phase.phase: phase.seconds for phase in old.phases}
    return RouterActivity(
        name=process.name,
        address=process.address,
        state=process.state,
        answers=process.name in after.routers,
        steps=new.steps - old.steps,
        overlapped_steps=new.overlapped_steps - old.overlapped_steps,
        prompt_tokens=new.prompt_tokens - old.prompt_tokens,
        generated_tokens=new.generated_tokens - old.generated_tokens,
        prefix_lookup_tokens=new.prefix_lookup_tokens - old.prefix_lookup_tokens,
        prefix_hit_tokens=new.prefix_hit_tokens - old.prefix_hit_tokens,
        preemptions=new.preemptions - old.preemptions,
        running_sequences=new.running_sequences,
        waiting_sequences=new.waiting_sequences,
        parked_sequences=new.parked_sequences,
        kv_blocks_used=new.kv_blocks_used,
        kv_blocks_total=new.kv_blocks_total,
        phases_s={phase.phase: phase.seconds - old_s.get(phase.phase, 0.0) for phase in new.phases},
    )


def _worker(process: ObservedProcess, before: Observation, after: Observation) -> WorkerActivity:
    old, new = _pair(before.workers, after.workers, process.name, _WorkerStats(), after.at_s - before.at_s)
    links = [_link(name, process.address, before, after) for name in after.routers]
    return WorkerActivity(
        name=process.name,
        address=process.address,
        state=process.state,
        answers=process.name in after.workers,
        detail=process.detail,
        rows=new.rows - old.rows,
        calls=new.calls - old.calls,
        busy_s=new.busy_s - old.busy_s,
        sent_bytes=sum(new.sent_bytes - old.sent_bytes for old, new in links),
        received_bytes=sum(new.received_bytes - old.received_bytes for old, new in links),
        failed_calls=sum(new.failed_calls - old.failed_calls for old, new in links),
        all_failed_calls=sum(new.failed_calls for _, new in links),
        hedged_calls=sum(new.hedged_calls for _, new in links),
        circuits=tuple(sorted({new.circuit for _, new in links} - {"", "closed"})),
        transports=tuple(sorted({new.transport for _, new in links if new.transport})),
        call_p50_us=max((new.call_p50_us for _, new in links), default=0),
        call_p99_us=max((new.call_p99_us for _, new in links), default=0),
    )


def _link(router: str, worker: str, before: Observation, after: Observation) -> tuple[_Traffic, _Traffic]:
    """The traffic between one router and the worker at an address, at both observations.

    Two starts of a worker, and two workers of one name, have different addresses.
    """
    old, new = _pair(before.routers, after.routers, router, _RouterStats(), after.at_s - before.at_s)
    return _traffic(old, worker), _traffic(new, worker)


def _traffic(stats: _RouterStats, worker: str) -> _Traffic:
    return next((traffic for traffic in stats.workers if traffic.address == worker), _Traffic())


class _Counters(Protocol):
    """The counters of one process since its start."""

    @property
    def uptime_s(self) -> float: ...


_C = TypeVar("_C", bound=_Counters)


def _pair(
    before: Mapping[str, _C], after: Mapping[str, _C], name: str, zero: _C, seconds: float
) -> tuple[_C, _C]:
    """The earlier and the later counters of one process.

    A process that did not answer earlier counts as unchanged, unless it was started in between: then it began
    at zero.
    """
    new = after.get(name, zero)
    old = before.get(name, zero if new.uptime_s <= seconds else new)
    return (zero, new) if old.uptime_s > new.uptime_s else (old, new)
