"""Where the time of a run's steps went: its activity per step and per token. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.observation.activity import Activity


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """One worker during a run. `rows` counts (token, expert) pairs; latencies are those of WorkerActivity."""

    name: str
    busy_share: float
    rows: int
    calls: int
    failed_calls: int
    transports: tuple[str, ...]
    call_p50_us: int
    call_p99_us: int


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The average step of all routers. Tokens are those that passed the layers, prompt tokens included."""

    steps: int
    overlapped_steps: int
    tokens_per_step: float
    # Milliseconds by phase, in the names and the order of `router.phase_clock.Phase`.
    phases_ms: dict[str, float]
    step_ms: float
    # The share of the routers' time in which they had nothing to do, or which no phase counts.
    outside_steps_share: float
    # Bytes of rows per token, in both directions.
    bytes_per_token: float
    # Calls to workers per generated token.
    calls_per_output_token: float
    prefix_hit_share: float | None
    preemptions: int
    workers: tuple[WorkerProfile, ...]


def profile_steps(activity: Activity) -> StepProfile:
    """Averages a run over its steps."""
    tokens = activity.prompt_tokens + activity.generated_tokens
    phases_ms = {phase: _per(1000 * seconds, activity.steps) for phase, seconds in activity.phases_s.items()}
    in_steps_s = sum(activity.phases_s.values())
    router_s = activity.seconds * len(activity.routers)
    return StepProfile(
        steps=activity.steps,
        overlapped_steps=sum(router.overlapped_steps for router in activity.routers),
        tokens_per_step=_per(tokens, activity.steps),
        phases_ms=phases_ms,
        step_ms=_per(1000 * in_steps_s, activity.steps),
        outside_steps_share=max(0.0, 1.0 - in_steps_s / router_s) if router_s > 0 else 0.0,
        bytes_per_token=_per(activity.wire_bytes, tokens),
        calls_per_output_token=_per(activity.calls, activity.generated_tokens),
        prefix_hit_share=activity.prefix_hit_share,
        preemptions=sum(router.preemptions for router in activity.routers),
        workers=tuple(
            WorkerProfile(
                name=worker.name,
                busy_share=activity.busy_share(worker),
                rows=worker.rows,
                calls=worker.calls,
                failed_calls=worker.failed_calls,
                transports=worker.transports,
                call_p50_us=worker.call_p50_us,
                call_p99_us=worker.call_p99_us,
            )
            for worker in activity.workers
        ),
    )


def _per(amount: float, count: int) -> float:
    return amount / count if count else 0.0
