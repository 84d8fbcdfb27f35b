"""Where the steps of a run went: its activity, a step and a token at a time. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.observation.activity import Activity


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """One worker during a run. `rows`: (token, expert) pairs; latencies as in WorkerActivity."""

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
    """What one step cost on average, over all routers. A token is one that went through the layers, of a prompt or not."""

    steps: int
    overlapped_steps: int
    tokens_per_step: float
    # By phase, in the names and the order of `router.phase_clock.Phase`.
    phases_ms: dict[str, float]
    step_ms: float
    # Of the routers' time: waiting for something to do, and what no phase counts.
    outside_steps_share: float
    # There and back, per token.
    bytes_per_token: float
    # Calls to workers per token that came out.
    calls_per_output_token: float
    prefix_hit_share: float | None
    preemptions: int
    workers: tuple[WorkerProfile, ...]


def profile_steps(activity: Activity) -> StepProfile:
    """The average step of a run."""
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
