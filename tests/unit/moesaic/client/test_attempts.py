"""When a failed call is tried again, with a clock of the test's own."""

from __future__ import annotations

import pytest

from moesaic.client.attempts import MAX_RETRIES, Attempts
from moesaic.errors import InternalError, MoesaicError, Overloaded, Unavailable


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def attempts(
    timeout_s: float = 1000.0, *, retries: bool = True, clock: Clock | None = None, share: float = 0.0
) -> Attempts:
    return Attempts(timeout_s, retries=retries, now=clock or Clock(), random_share=lambda: share)


@pytest.mark.parametrize("error", [Unavailable, Overloaded])
def test_a_refusal_that_names_a_time_is_repeated_after_it(error: type[MoesaicError]) -> None:
    assert attempts().delay_after(error("full", retry_after_s=2.0)) == 2.0


@pytest.mark.parametrize(
    "failure",
    [Unavailable("no router answers"), Overloaded("full"), InternalError("a bug", retry_after_s=1.0)],
)
def test_a_failure_without_such_a_time_is_final(failure: MoesaicError) -> None:
    assert attempts().delay_after(failure) is None


def test_delays_double_and_end_after_a_number_of_retries() -> None:
    tried, refusal = attempts(), Unavailable("starting", retry_after_s=1.0)

    delays = [tried.delay_after(refusal) for _ in range(MAX_RETRIES + 1)]

    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, None]


def test_a_delay_is_up_to_a_quarter_longer_at_random() -> None:
    assert attempts(share=1.0).delay_after(Unavailable("starting", retry_after_s=2.0)) == 2.5


def test_no_retry_is_awaited_that_would_begin_after_the_deadline() -> None:
    clock = Clock()
    tried, refusal = attempts(10.0, clock=clock), Overloaded("full", retry_after_s=3.0)

    assert tried.delay_after(refusal) == 3.0
    clock.now_s += 5.0
    assert tried.time_left_s == 5.0
    assert tried.delay_after(refusal) is None


def test_nothing_is_repeated_where_retries_are_off() -> None:
    assert attempts(retries=False).delay_after(Unavailable("starting", retry_after_s=1.0)) is None


def test_no_time_is_left_after_the_deadline() -> None:
    clock = Clock()
    tried = attempts(10.0, clock=clock)
    clock.now_s += 11.0

    assert tried.time_left_s == 0.0
