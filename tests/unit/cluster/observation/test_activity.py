"""What happened between two observations, whatever was restarted or away in between."""

from __future__ import annotations

import pytest

from cluster.observation.activity import Activity, activity_between
from cluster.observation.observer import Observation, ObservedProcess
from cluster.observation.step_profile import profile_steps
from moesaic.v1 import control_pb2, expert_pb2, inference_pb2

READY = control_pb2.PROCESS_STATE_READY
MEMBERS = (
    ObservedProcess("router-0", "127.0.0.1:1", True, READY),
    ObservedProcess("router-1", "127.0.0.1:2", True, READY),
    ObservedProcess("expert-worker-0", "127.0.0.1:3", False, READY),
)


def router(factor: int, *, uptime_s: float = 0.0, p99_us: int = 900) -> inference_pb2.GetRouterStatsResponse:
    """Counters that are `factor` times those of one second of work."""
    return inference_pb2.GetRouterStatsResponse(
        steps=10 * factor,
        prompt_tokens=60 * factor,
        generated_tokens=40 * factor,
        running_sequences=3,
        kv_blocks_used=5,
        kv_blocks_total=10,
        prefix_lookup_tokens=60 * factor,
        prefix_hit_tokens=15 * factor,
        phases=[
            inference_pb2.PhaseTime(phase="attention", seconds=0.3 * factor),
            inference_pb2.PhaseTime(phase="wire", seconds=0.1 * factor),
        ],
        workers=[
            inference_pb2.WorkerTraffic(
                worker="expert-worker-0",
                address="127.0.0.1:3",
                calls=20 * factor,
                failed_calls=factor,
                sent_bytes=1000 * factor,
                received_bytes=3000 * factor,
                transport="shared_memory",
                call_p50_us=300,
                call_p99_us=p99_us,
            )
        ],
        uptime_s=uptime_s or 100.0 + factor,
    )


def worker(factor: int, *, uptime_s: float = 0.0) -> expert_pb2.GetWorkerStatsResponse:
    return expert_pb2.GetWorkerStatsResponse(
        calls=40 * factor, rows=200 * factor, busy_s=0.5 * factor, uptime_s=uptime_s or 100.0 + factor
    )


def observation(
    at_s: float,
    *routers: inference_pb2.GetRouterStatsResponse | None,
    worker: expert_pb2.GetWorkerStatsResponse | None,
) -> Observation:
    """Routers and the worker by number; None: away."""
    return Observation(
        at_s=at_s,
        model=inference_pb2.GetModelInfoResponse(model="tiny"),
        processes=MEMBERS,
        routers={f"router-{index}": stats for index, stats in enumerate(routers) if stats is not None},
        workers={} if worker is None else {"expert-worker-0": worker},
    )


def two_seconds() -> Activity:
    """Two routers and their worker, each with two seconds' worth of work."""
    return activity_between(
        observation(50.0, router(3), router(5), worker=worker(7)),
        observation(52.0, router(5), router(7, p99_us=1700), worker=worker(9)),
    )


def test_several_routers_add_up() -> None:
    activity = two_seconds()
    assert (activity.seconds, activity.steps) == (2.0, 40)
    assert (activity.prompt_tokens, activity.generated_tokens) == (240, 160)
    assert activity.prefix_hit_share == 0.25
    assert activity.phases_s == pytest.approx({"attention": 1.2, "wire": 0.4})
    assert activity.rate(activity.generated_tokens) == 80.0


def test_a_worker_has_its_own_counters_and_its_traffic_with_every_router() -> None:
    (it,) = two_seconds().workers
    assert (it.rows, it.calls, it.busy_s) == (400, 80, 1.0)
    assert (it.sent_bytes, it.received_bytes) == (4000, 12000)
    assert (it.failed_calls, it.all_failed_calls) == (4, 12)
    assert it.transports == ("shared_memory",)
    assert (it.call_p50_us, it.call_p99_us) == (300, 1700)


def test_what_a_router_counted_for_an_earlier_start_of_a_worker_is_not_that_of_the_present_one() -> None:
    earlier = router(5)
    earlier.workers[0].address = "127.0.0.1:33"
    activity = activity_between(
        observation(50.0, earlier, worker=worker(1)), observation(52.0, router(1), worker=worker(1))
    )
    assert activity.workers[0].all_failed_calls == 1


def test_what_a_restarted_process_has_counted_is_all_new() -> None:
    activity = activity_between(
        observation(50.0, router(3), worker=worker(7)),
        observation(52.0, router(1, uptime_s=1.0), worker=worker(1, uptime_s=1.0)),
    )
    assert (activity.steps, activity.workers[0].calls) == (10, 40)


def test_a_process_that_was_away_before_has_done_nothing_that_is_known() -> None:
    activity = activity_between(
        observation(50.0, None, worker=None), observation(52.0, router(3), worker=worker(7))
    )
    assert (activity.steps, activity.workers[0].rows) == (0, 0)
    assert activity.routers[0].running_sequences == 3


def test_a_process_that_began_in_between_has_done_all_that_it_counts() -> None:
    activity = activity_between(
        observation(50.0, None, worker=None),
        observation(52.0, router(1, uptime_s=1.5), worker=worker(1, uptime_s=1.5)),
    )
    assert (activity.steps, activity.workers[0].rows) == (10, 200)


def test_a_process_that_is_away_now_is_there_with_nothing() -> None:
    activity = activity_between(
        observation(50.0, router(3), router(5), worker=worker(7)),
        observation(52.0, router(4), None, worker=None),
    )
    assert [router.answers for router in activity.routers] == [True, False]
    assert not activity.workers[0].answers
    assert (activity.routers[1].steps, activity.workers[0].calls) == (0, 0)


def test_the_same_look_twice_divides_by_nothing() -> None:
    same = observation(50.0, router(3), worker=worker(7))
    activity = activity_between(same, same)
    assert activity.rate(activity.generated_tokens) == 0.0
    assert activity.busy_share(activity.workers[0]) == 0.0
    assert profile_steps(activity).step_ms == 0.0


def test_a_step_and_a_token_have_their_cost() -> None:
    profile = profile_steps(two_seconds())
    assert profile.phases_ms == pytest.approx({"attention": 30.0, "wire": 10.0})
    assert profile.step_ms == pytest.approx(40.0)
    assert profile.tokens_per_step == 10.0
    assert profile.bytes_per_token == 40.0
    assert profile.calls_per_output_token == 0.5
    # 1.6 of the 4 seconds that two routers had.
    assert profile.outside_steps_share == pytest.approx(0.6)
    assert profile.workers[0].busy_share == 0.5
