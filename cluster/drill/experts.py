"""Which experts the model has while a drill changes them, what may come next, and what came of a change. Pure.

The way leads through three models: the one of the folder, the one with a first bundle, and the one with a better
bundle in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.bundles import demo_bundles


class Verb(StrEnum):
    ADD = "add"
    SWAP = "swap"
    CANARY = "canary"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    REMOVE = "remove"


class Outcome(StrEnum):
    """What a change left: the epoch that it was to make, the one before, or neither."""

    COMMITTED = "committed"
    LEFT = "left"
    TORN = "torn"


class Bundle(StrEnum):
    """What the model has beside the experts of its folder."""

    NONE = ""
    FIRST = demo_bundles.FIRST
    BETTER = demo_bundles.BETTER


@dataclass(frozen=True, slots=True)
class Experts:
    """What new requests are computed with, and what is on trial beside it."""

    current: Bundle = Bundle.NONE
    trial: Bundle | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """`bundle`: the one that is brought or taken away, or that is current afterwards."""

    verb: Verb
    bundle: Bundle
    after: Experts

    @property
    def title(self) -> str:
        return f"{self.verb} {self.bundle}".strip()


def possible_changes(now: Experts) -> tuple[Change, ...]:
    """All that may come next; every model and every verb is reached from every other one."""
    if now.trial is not None:
        return (
            Change(Verb.PROMOTE, now.trial, Experts(now.trial)),
            Change(Verb.ROLLBACK, now.current, Experts(now.current)),
        )
    return _CHANGES[now.current]


_CHANGES = {
    Bundle.NONE: (
        Change(Verb.ADD, Bundle.FIRST, Experts(Bundle.FIRST)),
        Change(Verb.CANARY, Bundle.FIRST, Experts(Bundle.NONE, Bundle.FIRST)),
    ),
    Bundle.FIRST: (
        Change(Verb.SWAP, Bundle.BETTER, Experts(Bundle.BETTER)),
        Change(Verb.CANARY, Bundle.BETTER, Experts(Bundle.FIRST, Bundle.BETTER)),
        Change(Verb.REMOVE, Bundle.FIRST, Experts()),
    ),
    Bundle.BETTER: (
        Change(Verb.ROLLBACK, Bundle.FIRST, Experts(Bundle.FIRST)),
        Change(Verb.REMOVE, Bundle.BETTER, Experts()),
    ),
}

# Through all three models and back.
ROUND = (_CHANGES[Bundle.NONE][0], _CHANGES[Bundle.FIRST][0], _CHANGES[Bundle.BETTER][1])


def way_back(now: Experts) -> Change | None:
    """The change that leads towards the model of the folder; None there."""
    if now == Experts():
        return None
    return possible_changes(now)[-1]


def outcome_of(change: Change, before: Experts, after: Experts | None) -> Outcome:
    """`after`: None where an epoch is in use that no change was to make.

    A trial may end by itself, which is the old epoch, too.
    """
    if after == change.after:
        return Outcome.COMMITTED
    return Outcome.LEFT if after in (before, Experts(before.current)) else Outcome.TORN
