"""When a failed call is tried again, with a clock of the test's own."""

from __future__ import annotations

import pytest

from moesaic.client.attempts import MAX_RESUMES, MAX_RETRIES, ROUTER_UNREACHABLE, Attempts
from moesaic.errors import FailedPrecondition, InternalError, MoesaicError, Overloaded, Unavailable


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def attempts(
    timeout_s: float = 1000.0,
    *,
    retries: bool = True,
    clock: Clock | None = None,
    share: float = 0.0,
    num_routers: int = 1,
) -> Attempts:
    return Attempts(
        timeout_s,
        retries=retries,
        num_routers=num_routers,
        now=clock or Clock(),
        random_share=lambda: share,
    )


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


LOST = Unavailable("the connection broke", reason=ROUTER_UNREACHABLE)
FULL = Overloaded("full", reason="QUEUE_FULL", retry_after_s=3.0)


def test_a_router_that_never_answered_is_not_awaited() -> None:
    assert attempts().delay_after(LOST) is None


def test_one_that_has_answered_is_awaited_with_growing_pauses_to_the_deadline() -> None:
    clock = Clock()
    tried = attempts(20.0, clock=clock)
    tried.note_answer()
    delays = []
    while (delay_s := tried.delay_after(LOST, begun=True)) is not None:
        delays.append(delay_s)
        clock.now_s += delay_s
    assert delays[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert 18.0 <= sum(delays) < 20.0


def test_a_lost_router_is_replaced_by_each_of_the_others_at_once() -> None:
    tried = attempts(num_routers=3)
    assert [tried.delay_after(LOST) for _ in range(3)] == [0.0, 0.0, None]
    tried.note_answer()
    assert [tried.delay_after(LOST, begun=True) for _ in range(4)] == [0.0, 0.0, 0.1, 0.2]


@pytest.mark.parametrize("reason", ["STOPPING", "DRAINING"])
def test_a_router_that_was_told_to_stop_is_replaced_but_not_awaited(reason: str) -> None:
    leaving = Unavailable("the router stops", reason=reason, retry_after_s=1.0)
    tried = attempts(num_routers=2)
    tried.note_answer()
    assert [tried.delay_after(leaving, begun=True) for _ in range(2)] == [0.0, None]


def test_others_are_asked_before_a_refusal_is_waited_for() -> None:
    tried = attempts(num_routers=2)
    assert [tried.delay_after(FULL) for _ in range(3)] == [0.0, 3.0, 6.0]


def test_what_refuses_the_rest_of_an_answer_is_asked_again_whatever_it_says_of_time() -> None:
    tried = attempts()
    tried.note_answer()
    assert [tried.delay_after(it, begun=True) for it in (LOST, FULL, FULL)] == [0.1, 0.2, 0.4]


def test_an_epoch_that_is_gone_is_not_asked_for_until_the_deadline() -> None:
    tried = attempts()
    tried.note_answer()
    gone = FailedPrecondition("not held", reason="EPOCH_UNKNOWN")
    delays = [tried.delay_after(gone, begun=True) for _ in range(MAX_RETRIES + 1)]
    assert delays[-1] is None and None not in delays[:-1]


def test_an_answer_goes_on_only_so_often() -> None:
    tried = attempts()
    delays = []
    for _ in range(MAX_RESUMES + 1):
        tried.note_answer()
        delays.append(tried.delay_after(LOST, begun=True))
    assert delays == [0.1] * MAX_RESUMES + [None]


@pytest.mark.parametrize(
    "failure",
    [
        Unavailable("no replica left", reason="NO_REPLICA", retry_after_s=1.0),
        FailedPrecondition("not held", reason="WRONG_VERSION"),
        InternalError("a bug"),
    ],
)
def test_an_error_of_the_answer_itself_ends_it(failure: MoesaicError) -> None:
    tried = attempts(num_routers=3)
    tried.note_answer()
    assert tried.delay_after(failure, begun=True) is None


def test_nothing_goes_on_where_retries_are_off() -> None:
    tried = attempts(retries=False, num_routers=2)
    tried.note_answer()
    assert tried.delay_after(LOST, begun=True) is None
