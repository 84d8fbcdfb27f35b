"""Five times the requests that a router can answer, in virtual time: it goes on answering as many as it can."""

from __future__ import annotations

from collections import Counter

import pytest
from simulation.overload import (
    DECODE_S,
    MAX_RUNNING,
    MAX_WAITING,
    PROMPT_S,
    STEP_S,
    Demand,
    Outcome,
    Router,
)

FACTOR, SECONDS = 5, 120.0
# A quiet time before, in which the router gets to know its pace.
QUIET_S = 20.0
DEMANDS = {
    "deadlines of a few answers": Demand(deadline_s=3.0),
    "deadlines beyond the queue": Demand(deadline_s=60.0),
    "long prompts": Demand(deadline_s=10.0, prompt_tokens=400),
    "long answers": Demand(deadline_s=15.0, answer_tokens=100, allowed_tokens=250),
}


def capacity(demand: Demand) -> float:
    """Requests a second of a machine whose places are all taken."""
    token_s = (STEP_S + DECODE_S * MAX_RUNNING) / MAX_RUNNING
    return 1 / (demand.answer_tokens * token_s + demand.prompt_tokens * PROMPT_S)


def overloaded(demand: Demand, seed: int) -> Outcome:
    router = Router(seed, demand)
    router.serve(capacity(demand) / 2, QUIET_S)
    outcome = router.serve(FACTOR * capacity(demand), SECONDS)
    router.check_empty()
    return outcome


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("demand", DEMANDS.values(), ids=DEMANDS)
def test_overload_costs_neither_goodput_nor_work(demand: Demand, seed: int) -> None:
    outcome = overloaded(demand, seed)
    peak = capacity(demand) * demand.answer_tokens
    assert outcome.good_tokens / SECONDS >= 0.9 * peak
    assert outcome.wasted_share <= 0.02
    assert outcome.most_waiting <= MAX_WAITING + MAX_RUNNING
    assert min(outcome.retry_after_s) >= 1


def test_a_router_that_can_do_it_all_refuses_nobody() -> None:
    for demand in DEMANDS.values():
        router = Router(1, demand)
        outcome = router.serve(0.5 * capacity(demand), SECONDS)
        assert outcome.ends == Counter({"answered": len(outcome.ended)})
        assert not outcome.wasted_tokens


def test_a_router_that_never_was_quiet_finds_its_pace_under_overload() -> None:
    for demand in DEMANDS.values():
        router = Router(2, demand)
        router.serve(FACTOR * capacity(demand), SECONDS)
        assert router.serve(FACTOR * capacity(demand), SECONDS).wasted_share <= 0.02
