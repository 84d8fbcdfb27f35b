"""A router's counters in the form in which the service reports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil

from moesaic.v1 import inference_pb2
from router.engine.engine import EngineStats
from router.gating.gate_stats import LayerGateStats
from router.workers.replica_pool import ReplicaHealth


def router_stats(
    stats: EngineStats,
    *,
    phases: Mapping[str, float],
    replicas: Sequence[ReplicaHealth],
    gates: Sequence[LayerGateStats],
    experts: int,
    experts_without_worker: int,
    uptime_s: float,
) -> inference_pb2.GetRouterStatsResponse:
    """One message with the counters of engine, replicas and gates, and the seconds of each phase."""
    return inference_pb2.GetRouterStatsResponse(
        steps=stats.steps,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
        running_sequences=stats.running,
        waiting_sequences=stats.waiting,
        kv_blocks_used=stats.kv_blocks_used,
        kv_blocks_total=stats.kv_blocks_total,
        preemptions=stats.preemptions,
        phases=[inference_pb2.PhaseTime(phase=phase, seconds=seconds) for phase, seconds in phases.items()],
        workers=[_traffic(replica) for replica in replicas],
        resident_bytes=psutil.Process().memory_info().rss,
        experts=experts,
        experts_without_worker=experts_without_worker,
        uptime_s=uptime_s,
        prefix_lookup_tokens=stats.prefix_lookup_tokens,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        overlapped_steps=stats.overlapped_steps,
        parked_sequences=stats.parked,
        degraded_assignments=stats.degraded,
        refusals=stats.refusals,
        gates=[
            inference_pb2.GateStats(
                layer=gate.layer, z_loss=gate.z_loss, assignments=gate.assignments, dropped=gate.dropped
            )
            for gate in gates
        ],
    )


def _traffic(replica: ReplicaHealth) -> inference_pb2.WorkerTraffic:
    link, traffic = replica.link, replica.link.traffic
    return inference_pb2.WorkerTraffic(
        worker=link.replica.worker,
        address=link.replica.address,
        connected=link.connected,
        calls=traffic.calls,
        rows=traffic.rows,
        failed_calls=traffic.failed_calls,
        sent_bytes=traffic.sent_bytes,
        received_bytes=traffic.received_bytes,
        transport=traffic.transport,
        call_p50_us=traffic.latency_us(0.5),
        call_p99_us=traffic.latency_us(0.99),
        circuit=replica.circuit.value,
        in_flight=link.num_in_flight,
        last_error=replica.last_error,
        hedged_calls=traffic.hedged_calls,
    )
