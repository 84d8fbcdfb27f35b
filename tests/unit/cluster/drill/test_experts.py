"""Changes lead from every model to every other one and back, and each leaves the old epoch or the new one."""

from __future__ import annotations

import pytest

from cluster.drill.experts import (
    ROUND,
    Bundle,
    Change,
    Experts,
    Outcome,
    Verb,
    outcome_of,
    possible_changes,
    way_back,
)

ON_TRIAL = Experts(Bundle.FIRST, Bundle.BETTER)


def reached_from(start: Experts) -> dict[Experts, tuple[Change, ...]]:
    """Everything that changes can come to, each with what may follow."""
    found: dict[Experts, tuple[Change, ...]] = {}
    waiting = [start]
    while waiting:
        now = waiting.pop()
        if now not in found:
            found[now] = possible_changes(now)
            waiting += [change.after for change in found[now]]
    return found


def test_from_every_model_every_other_one_is_reached_and_every_verb_is_used() -> None:
    found = reached_from(Experts())
    assert {experts.current for experts in found} == set(Bundle)
    assert all(reached_from(experts).keys() == found.keys() for experts in found)
    assert {change.verb for changes in found.values() for change in changes} == set(Verb)


def test_the_round_makes_every_model_and_ends_where_it_began() -> None:
    now, seen = Experts(), {Experts().current}
    for change in ROUND:
        assert change in possible_changes(now)
        now = change.after
        seen.add(now.current)
    assert (now, seen) == (Experts(), set(Bundle))


@pytest.mark.parametrize("start", reached_from(Experts()))
def test_there_is_a_way_back_from_everywhere(start: Experts) -> None:
    now, steps = start, 0
    while (change := way_back(now)) is not None:
        now, steps = change.after, steps + 1
    assert now == Experts()
    assert steps <= 2


@pytest.mark.parametrize(
    ("after", "outcome"),
    [
        (Experts(Bundle.BETTER), Outcome.COMMITTED),
        (ON_TRIAL, Outcome.LEFT),
        (Experts(Bundle.FIRST), Outcome.LEFT),
        (Experts(), Outcome.TORN),
        (Experts(Bundle.BETTER, Bundle.FIRST), Outcome.TORN),
        (None, Outcome.TORN),
    ],
)
def test_a_change_ends_in_the_new_epoch_or_in_the_old_one_whose_trial_may_have_ended(
    after: Experts | None, outcome: Outcome
) -> None:
    promote = Change(Verb.PROMOTE, Bundle.BETTER, Experts(Bundle.BETTER))
    assert outcome_of(promote, ON_TRIAL, after) is outcome
