"""The compute thread: callers share passes, the queue is bounded, and health follows the thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

import pytest
import torch
from torch import Tensor

from expert_worker.compute.batcher import Batcher
from expert_worker.compute.call import ExpertCall
from expert_worker.compute.call_queue import Computed
from expert_worker.experts.expert import MlpExpert
from moesaic.compute.linear import Linear
from moesaic.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    MoesaicError,
    Overloaded,
    Unavailable,
)

EXPERT = MlpExpert(Linear(torch.zeros(2, 1)), Linear(torch.zeros(1, 1)), lambda rows: rows)


def call(tag: float, *, layer: int = 0, num_rows: int = 1, timeout_s: float = 60.0) -> ExpertCall:
    hidden, rows = torch.full((num_rows, 1), tag), torch.arange(num_rows)
    return ExpertCall(layer, hidden, (EXPERT,), (num_rows,), rows, None, time.monotonic() + timeout_s)


class GatedCompute:
    """Doubles the rows of every call, pass by pass, each when the test lets it go."""

    def __init__(self) -> None:
        self.passes: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: BaseException | None = None

    def __call__(self, calls: Sequence[ExpertCall]) -> list[Tensor | MoesaicError]:
        self.passes.append([call.hidden[0, 0].item() for call in calls])
        self.entered.set()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return [InvalidArgument("odd") if call.hidden[0, 0] < 0 else call.hidden * 2 for call in calls]


class FakeClock:
    def __init__(self) -> None:
        self.now_s = time.monotonic()

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def compute() -> GatedCompute:
    return GatedCompute()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def batcher(compute: GatedCompute, clock: FakeClock) -> AsyncIterator[Batcher]:
    batcher = Batcher(compute, max_queued_calls=3, max_pass_rows=8, hang_limit_s=5.0, clock=clock)
    batcher.start()
    yield batcher
    compute.gate.set()
    assert await batcher.stop(5.0)


async def block(batcher: Batcher, compute: GatedCompute, **first: float) -> asyncio.Task[Computed]:
    """Occupies the compute thread with a call; what is submitted next has to wait."""
    compute.gate.clear()
    compute.entered.clear()
    running = asyncio.create_task(batcher.submit(call(1.0, layer=9, **first)))  # type: ignore[arg-type]
    assert await asyncio.to_thread(compute.entered.wait, 60)
    return running


async def submit_all(batcher: Batcher, calls: Sequence[ExpertCall]) -> list[asyncio.Task[Computed]]:
    tasks = [asyncio.create_task(batcher.submit(one)) for one in calls]
    await asyncio.sleep(0)
    return tasks


async def test_a_call_is_computed(batcher: Batcher) -> None:
    computed = await batcher.submit(call(3.0))
    assert computed.output.item() == 6.0
    assert batcher.stats().passes == 1


async def test_waiting_calls_of_one_layer_share_a_pass_and_each_gets_its_own_rows(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    waiting = await submit_all(batcher, [call(2.0), call(3.0), call(4.0)])
    compute.gate.set()
    assert [(await task).output.item() for task in (running, *waiting)] == [2.0, 4.0, 6.0, 8.0]
    assert compute.passes == [[1.0], [2.0, 3.0, 4.0]]
    assert batcher.stats().passes == 2


async def test_layers_are_never_mixed_and_the_oldest_call_goes_first(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    waiting = await submit_all(batcher, [call(2.0, layer=1), call(3.0, layer=2), call(4.0, layer=1)])
    compute.gate.set()
    await asyncio.gather(running, *waiting)
    assert compute.passes == [[1.0], [2.0, 4.0], [3.0]]


async def test_a_pass_is_bounded_in_rows_but_takes_one_call_of_any_size(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    waiting = await submit_all(
        batcher, [call(2.0, num_rows=20), call(3.0, num_rows=5), call(4.0, num_rows=4)]
    )
    compute.gate.set()
    await asyncio.gather(running, *waiting)
    assert compute.passes == [[1.0], [2.0], [3.0], [4.0]]


async def test_a_full_queue_refuses_at_once_and_says_when_to_retry(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    waiting = await submit_all(batcher, [call(float(tag)) for tag in range(2, 5)])
    with pytest.raises(Overloaded) as caught:
        await batcher.submit(call(5.0))
    assert caught.value.retry_after_s
    compute.gate.set()
    assert [(await task).output.item() for task in (running, *waiting)] == [2.0, 4.0, 6.0, 8.0]


async def test_a_call_whose_time_is_over_is_answered_and_never_computed(
    batcher: Batcher, compute: GatedCompute, clock: FakeClock
) -> None:
    running = await block(batcher, compute)
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(call(2.0, timeout_s=0.01))
    compute.gate.set()
    await running
    await batcher.submit(call(3.0))
    assert compute.passes == [[1.0], [3.0]]


async def test_a_call_that_became_late_in_the_queue_is_dropped_unstarted(
    batcher: Batcher, compute: GatedCompute, clock: FakeClock
) -> None:
    running = await block(batcher, compute)
    (late,) = await submit_all(batcher, [call(2.0, timeout_s=0.5)])
    clock.now_s += 1.0  # the thread finds it late before the event loop does
    compute.gate.set()
    await running
    with pytest.raises(DeadlineExceeded):
        await late
    assert compute.passes == [[1.0]]


async def test_a_caller_that_went_away_is_not_computed_and_gives_its_place_free(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    gone, *waiting = await submit_all(batcher, [call(2.0), call(3.0), call(4.0)])
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    waiting += await submit_all(batcher, [call(5.0)])
    compute.gate.set()
    await asyncio.gather(running, *waiting)
    assert compute.passes == [[1.0], [3.0, 4.0, 5.0]]


async def test_a_refused_call_does_not_touch_its_neighbours(batcher: Batcher, compute: GatedCompute) -> None:
    running = await block(batcher, compute)
    odd, even = await submit_all(batcher, [call(-1.0), call(2.0)])
    compute.gate.set()
    await running
    with pytest.raises(InvalidArgument):
        await odd
    assert (await even).output.item() == 4.0


async def test_a_pass_that_fails_fails_its_calls_and_the_next_one_works(
    batcher: Batcher, compute: GatedCompute, caplog: pytest.LogCaptureFixture
) -> None:
    compute.error = RuntimeError("secret of the kernel")
    with pytest.raises(InternalError) as caught:
        await batcher.submit(call(1.0))
    assert "secret" not in caught.value.message
    assert "a pass failed" in caplog.text
    compute.error = None
    assert (await batcher.submit(call(2.0))).output.item() == 4.0
    assert batcher.is_healthy()


async def test_a_hanging_pass_is_unhealthy_until_it_ends(
    batcher: Batcher, compute: GatedCompute, clock: FakeClock
) -> None:
    running = await block(batcher, compute)
    assert batcher.is_healthy()
    clock.now_s += 6.0
    assert not batcher.is_healthy()
    compute.gate.set()
    await running
    await batcher.submit(call(2.0, timeout_s=60.0))
    assert batcher.is_healthy()


async def test_an_idle_worker_is_healthy_however_long_ago_it_worked(
    batcher: Batcher, clock: FakeClock
) -> None:
    await batcher.submit(call(1.0))
    await asyncio.sleep(0.05)
    clock.now_s += 1000.0
    assert batcher.is_healthy()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_thread_is_unhealthy_and_takes_no_calls(compute: GatedCompute) -> None:
    batcher = Batcher(compute, max_queued_calls=3, max_pass_rows=8)
    batcher.start()
    compute.error = KeyboardInterrupt()
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(call(1.0, timeout_s=0.2))
    async with asyncio.timeout(60):
        while batcher.is_healthy():
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable):
        await batcher.submit(call(2.0))


async def test_stop_lets_the_running_pass_finish_and_fails_what_waits(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    (waiting,) = await submit_all(batcher, [call(2.0)])
    assert not await batcher.stop(0.01)
    compute.gate.set()
    assert await batcher.stop(5.0)
    assert (await running).output.item() == 2.0
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await batcher.submit(call(3.0))


class SpyTicket:
    """A call whose answer is looked at, and may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.call = call(5.0)
        self.queued_s = time.monotonic()
        self.wanted = True
        self.error = error
        self.answers: list[tuple[str, type]] = []

    def answer(self, result: Computed | MoesaicError) -> None:
        self.answers.append((threading.current_thread().name, type(result)))
        if self.error is not None:
            raise self.error


async def test_every_answer_is_given_by_the_compute_thread_also_the_last_ones(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    waiting = SpyTicket()
    batcher.offer(waiting)
    assert not await batcher.stop(0.01)
    assert not waiting.answers
    compute.gate.set()
    assert await batcher.stop(5.0)
    assert waiting.answers == [("expert-compute", Unavailable)]
    assert (await running).output.item() == 2.0


async def test_an_answer_that_fails_ends_neither_the_thread_nor_other_calls(
    batcher: Batcher, compute: GatedCompute
) -> None:
    running = await block(batcher, compute)
    failing = SpyTicket(RuntimeError("gone"))
    batcher.offer(failing)
    (beside,) = await submit_all(batcher, [call(2.0)])
    compute.gate.set()
    assert ((await running).output.item(), (await beside).output.item()) == (2.0, 4.0)
    assert failing.answers == [("expert-compute", Computed)]
    assert batcher.is_healthy()


async def test_times_in_the_queue_and_in_the_pass_are_told_apart(
    batcher: Batcher, compute: GatedCompute, clock: FakeClock
) -> None:
    running = await block(batcher, compute)
    (waiting,) = await submit_all(batcher, [call(2.0, timeout_s=60.0)])
    clock.now_s += 2.0
    compute.gate.set()
    assert ((await running).queue_s, (await running).compute_s) == (0.0, 2.0)
    assert ((await waiting).queue_s, (await waiting).compute_s) == (2.0, 0.0)
    assert batcher.stats().busy_s == 2.0
