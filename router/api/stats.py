"""A router's counters in the form in which the service reports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil

from moesaic.v1 import inference_pb2
from router.engine.engine import EngineStats
from router.gating.gate_stats import LayerGateStats
from router.workers.worker_link import WorkerLink


def router_stats(
    stats: EngineStats,
    *,
    phases: Mapping[str, float],
    links: Sequence[WorkerLink],
    gates: Sequence[LayerGateStats],
    experts: int,
    experts_without_worker: int,
    uptime_s: float,
) -> inference_pb2.GetRouterStatsResponse:
    """One message with the counters of engine, links and gates, and the seconds of each phase."""
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
        workers=[_traffic(link) for link in links],
        resident_bytes=psutil.Process().memory_info().rss,
        experts=experts,
        experts_without_worker=experts_without_worker,
        uptime_s=uptime_s,
        prefix_lookup_tokens=stats.prefix_lookup_tokens,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        overlapped_steps=stats.overlapped_steps,
        parked_sequences=stats.parked,
        degraded_assignments=stats.degraded,
        gates=[
            inference_pb2.GateStats(
                layer=gate.layer, z_loss=gate.z_loss, assignments=gate.assignments, dropped=gate.dropped
            )
            for gate in gates
        ],
    )


def _traffic(link: WorkerLink) -> inference_pb2.WorkerTraffic:
    return inference_pb2.WorkerTraffic(
        worker=link.replica.worker,
        address=link.replica.address,
        connected=link.connected,
        calls=link.traffic.calls,
        rows=link.traffic.rows,
        failed_calls=link.traffic.failed_calls,
        sent_bytes=link.traffic.sent_bytes,
        received_bytes=link.traffic.received_bytes,
        transport=link.traffic.transport,
        call_p50_us=link.traffic.latency_us(0.5),
        call_p99_us=link.traffic.latency_us(0.99),
    )
