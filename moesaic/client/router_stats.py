"""A router's counters since its start, as frozen values of the client library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from moesaic.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """The seconds that all steps together spent in one phase."""

    phase: str
    seconds: float

    @classmethod
    def from_pb(cls, time: pb.PhaseTime) -> Self:
        return cls(time.phase, time.seconds)


@dataclass(frozen=True, slots=True)
class WorkerTraffic:
    """The traffic between the router and one worker."""

    worker: str
    address: str
    connected: bool
    calls: int
    rows: int
    failed_calls: int
    sent_bytes: int
    received_bytes: int
    # The transport of the newest call: "grpc", "direct" or "shared_memory".
    transport: str
    # The latency of the last calls, in microseconds.
    call_p50_us: int
    call_p99_us: int
    # Whether the router calls it: "closed", "suspect", "open", "half-open" or "quarantined" (docs/failures.md).
    circuit: str
    in_flight: int
    # Why its last failed call failed; empty while none did.
    last_error: str
    # Calls that another replica answered first because this one was late.
    hedged_calls: int

    @classmethod
    def from_pb(cls, traffic: pb.WorkerTraffic) -> Self:
        return cls(
            worker=traffic.worker,
            address=traffic.address,
            connected=traffic.connected,
            calls=traffic.calls,
            rows=traffic.rows,
            failed_calls=traffic.failed_calls,
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
            transport=traffic.transport,
            call_p50_us=traffic.call_p50_us,
            call_p99_us=traffic.call_p99_us,
            circuit=traffic.circuit,
            in_flight=traffic.in_flight,
            last_error=traffic.last_error,
            hedged_calls=traffic.hedged_calls,
        )


@dataclass(frozen=True, slots=True)
class GateStats:
    """The gate of one layer."""

    layer: int
    # The router z-loss of the last measured step; None before the first measurement.
    z_loss: float | None
    # The chosen (token, slot) pairs, and those whose slot was full. Counted with engine.capacity only.
    assignments: int
    dropped: int

    @classmethod
    def from_pb(cls, gate: pb.GateStats) -> Self:
        return cls(
            layer=gate.layer,
            z_loss=gate.z_loss if gate.HasField("z_loss") else None,
            assignments=gate.assignments,
            dropped=gate.dropped,
        )


@dataclass(frozen=True, slots=True)
class Refusals:
    """The sequences that were refused, or shed before anything was computed for them, for one reason."""

    # QUEUE_FULL or DEADLINE_UNREACHABLE.
    reason: str
    sequences: int


@dataclass(frozen=True, slots=True)
class RouterStats:
    """A router's counters since its start, and the time that its steps spent in each phase."""

    steps: int
    prompt_tokens: int
    generated_tokens: int
    running_sequences: int
    waiting_sequences: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int
    phases: tuple[PhaseTime, ...]
    workers: tuple[WorkerTraffic, ...]
    resident_bytes: int
    uptime_s: float
    # Prompt tokens that were looked up in the prefix cache, and those found there.
    prefix_lookup_tokens: int
    prefix_hit_tokens: int
    # Steps that ran as two micro-batches.
    overlapped_steps: int
    gates: tuple[GateStats, ...]
    # The experts of the epoch, and those of them that no worker holds now.
    experts: int
    experts_without_worker: int
    # Sequences that wait for a replica of an expert. They count as neither running nor waiting.
    parked_sequences: int = 0
    # The (token, layer, slot) assignments that were substituted or left out because no replica was left.
    degraded_assignments: int = 0
    refusals: tuple[Refusals, ...] = ()

    @classmethod
    def from_pb(cls, stats: pb.GetRouterStatsResponse) -> Self:
        return cls(
            steps=stats.steps,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            running_sequences=stats.running_sequences,
            waiting_sequences=stats.waiting_sequences,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_total=stats.kv_blocks_total,
            preemptions=stats.preemptions,
            phases=tuple(map(PhaseTime.from_pb, stats.phases)),
            workers=tuple(map(WorkerTraffic.from_pb, stats.workers)),
            resident_bytes=stats.resident_bytes,
            uptime_s=stats.uptime_s,
            prefix_lookup_tokens=stats.prefix_lookup_tokens,
            prefix_hit_tokens=stats.prefix_hit_tokens,
            overlapped_steps=stats.overlapped_steps,
            gates=tuple(map(GateStats.from_pb, stats.gates)),
            experts=stats.experts,
            experts_without_worker=stats.experts_without_worker,
            parked_sequences=stats.parked_sequences,
            degraded_assignments=stats.degraded_assignments,
            refusals=tuple(Refusals(*refused) for refused in sorted(stats.refusals.items())),
        )
