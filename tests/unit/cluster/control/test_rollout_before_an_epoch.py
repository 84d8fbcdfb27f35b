"""Workers start one after another, and the first epoch is made of what all of them hold."""

from __future__ import annotations

from cluster.control.rollout import Desired, Footprint, Observed, Unload, Worker, plan
from moesaic.epoch import Epoch, ExpertAddress, ExpertVersion

ADDRESS = ExpertAddress(0, 0)
HELD = ExpertVersion(ADDRESS, b"1" * 32)


def desired(*living: Epoch) -> Desired:
    return Desired(living, 1, frozenset({ADDRESS}), {}, {0: Footprint(1)})


def observed() -> Observed:
    return Observed((Worker("w", "host", frozenset({ADDRESS}), frozenset({HELD})),))


def test_nothing_is_taken_from_workers_before_there_is_an_epoch() -> None:
    assert plan(desired(), observed()) == ()


def test_what_no_epoch_needs_is_taken_away() -> None:
    other = Epoch.of("tiny", {ADDRESS: b"2" * 32})
    assert plan(desired(other), observed()) == (Unload("w", (HELD,)),)
