"""Slots of recurrent states: counted, copied, evicted."""

from __future__ import annotations

import pytest

from router.scheduling.state_pool import StateCopy, StatePool


def test_a_sequence_begins_with_nothing_or_with_a_kept_state() -> None:
    pool = StatePool(2, 1)
    first = pool.begin(None)
    pool.snapshot(first, b"a")
    second = pool.begin(b"a")
    blank, kept, forked = pool.take_copies()
    assert blank == StateCopy(None, first)
    assert kept.source == first and forked == StateCopy(kept.target, second)
    assert len({first, second, kept.target}) == 3
    assert pool.take_copies() == ()
    pool.check_integrity([first, second])


def test_a_state_is_kept_once_and_the_one_that_was_used_longest_ago_goes_first() -> None:
    pool = StatePool(1, 2)
    own = pool.begin(None)
    for name in (b"a", b"b", b"a", b"c"):
        pool.snapshot(own, name)
    assert [pool.has_snapshot(name) for name in (b"a", b"b", b"c")] == [True, False, True]
    assert len(pool.take_copies()) == 1 + 3
    pool.discard_snapshots([b"a", b"unknown"])
    assert not pool.has_snapshot(b"a")
    pool.check_integrity([own])


def test_the_state_that_a_sequence_goes_on_from_does_not_make_room_for_it() -> None:
    pool = StatePool(2, 1)
    first = pool.begin(None)
    pool.snapshot(first, b"older")
    pool.snapshot(first, b"newer")
    pool.take_copies()
    second = pool.begin(b"older")
    (fork,) = pool.take_copies()
    assert fork.target == second != fork.source
    assert pool.has_snapshot(b"older") and not pool.has_snapshot(b"newer")
    pool.check_integrity([first, second])


def test_integrity_is_checked() -> None:
    pool = StatePool(2, 1)
    own = pool.begin(None)
    pool.check_integrity([own])
    for wrong in ([], [own, own], [own, own + 1]):
        with pytest.raises(AssertionError):
            pool.check_integrity(wrong)


def test_a_pool_without_a_slot_to_copy_to_is_refused() -> None:
    with pytest.raises(ValueError, match="slot"):
        StatePool(4, 0)
