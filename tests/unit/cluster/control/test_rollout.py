"""What is to be done next, for what is desired and what is observed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from cluster.control.rollout import (
    MODEL_FOLDER,
    Commit,
    Desired,
    Footprint,
    Load,
    Observed,
    Probe,
    Publish,
    Unload,
    Worker,
    check_room,
    plan,
)
from moesaic.epoch import Epoch, EpochBundle, ExpertAddress, ExpertVersion
from moesaic.errors import FailedPrecondition, Unavailable

BUNDLE = b"b" * 32
A, B = ExpertAddress(0, 0), ExpertAddress(0, 1)
NEW = ExpertAddress(0, 2)
BASE_SLOTS = frozenset({A, B})


def version(address: ExpertAddress, salt: int = 0) -> ExpertVersion:
    return ExpertVersion(address, bytes([salt, *address]) + bytes(29))


OLD = Epoch.of("tiny", dict([version(A), version(B)]))
SWAP = Epoch.of("tiny", dict([version(A, 1), version(B)]), bundles=[EpochBundle("legal", BUNDLE, (), (A,))])
GROWN = Epoch.of(
    "tiny",
    dict([version(A), version(B), version(NEW, 1)]),
    bundles=[EpochBundle("maths", BUNDLE, (), (NEW,))],
)


def desired(*living: Epoch, candidate: Epoch | None = None, replicas: int = 2) -> Desired:
    return Desired(
        living=living,
        replicas=replicas,
        base_slots=BASE_SLOTS,
        footprints={version(A, 1): Footprint(10), version(NEW, 1): Footprint(10)},
        base_footprints={0: Footprint(10)},
        candidate=candidate,
    )


def worker(
    name: str,
    held: Iterable[ExpertVersion],
    room: int = 100,
    home: frozenset[ExpertAddress] = BASE_SLOTS,
    host: str = "",
) -> Worker:
    return Worker(name, host or name, home, frozenset(held), available_bytes=room, bytes_per_parameter=1.0)


BOTH = tuple(OLD.expert_versions)


def test_where_workers_hold_what_is_in_use_nothing_is_done() -> None:
    assert plan(desired(OLD), Observed((worker("w0", BOTH), worker("w1", BOTH)))) == ()


def test_a_swap_is_loaded_probed_published_and_committed() -> None:
    wanted = desired(OLD, SWAP, candidate=SWAP)
    w0, w1 = worker("w0", BOTH), worker("w1", BOTH)
    new = (version(A, 1),)
    assert plan(wanted, Observed((w0, w1))) == (Load("w0", BUNDLE, new), Load("w1", BUNDLE, new))
    w0, w1 = (replace(one, holdings=one.holdings | set(new), unproven=frozenset(new)) for one in (w0, w1))
    assert plan(wanted, Observed((w0, w1))) == (Probe("w0", BUNDLE, new), Probe("w1", BUNDLE, new))
    w0, w1 = replace(w0, unproven=frozenset()), replace(w1, unproven=frozenset())
    assert plan(wanted, Observed((w0, w1))) == (Publish(SWAP.id),)
    assert plan(wanted, Observed((w0, w1), frozenset({SWAP.id}))) == (Commit(SWAP.id),)
    assert plan(desired(SWAP, OLD), Observed((w0, w1))) == ()
    old = (version(A),)
    assert plan(desired(SWAP), Observed((w0, w1))) == (Unload("w0", old), Unload("w1", old))


def test_nothing_is_given_up_before_routers_could_say_what_they_hold() -> None:
    left = worker("w0", (*BOTH, version(A, 9)))
    assert plan(desired(OLD), Observed((left,), settled=False)) == ()
    assert plan(desired(OLD), Observed((left,))) == (Unload("w0", (version(A, 9),)),)


def test_a_swapped_slot_goes_to_the_workers_that_serve_it() -> None:
    w0 = worker("w0", [version(A)], home=frozenset({A}))
    w1 = worker("w1", [version(B)], home=frozenset({B}))
    actions = plan(desired(OLD, SWAP, candidate=SWAP), Observed((w0, w1)))
    assert actions == (Load("w0", BUNDLE, (version(A, 1),)),)


def test_a_new_slot_goes_to_as_many_workers_as_there_are_replicas_on_different_hosts() -> None:
    workers = (
        worker("w0", BOTH, 500, host="a"),
        worker("w1", BOTH, 400, host="a"),
        worker("w2", BOTH, 100, host="b"),
    )
    actions = plan(desired(OLD, GROWN, candidate=GROWN), Observed(workers))
    assert actions == (Load("w0", BUNDLE, (version(NEW, 1),)), Load("w2", BUNDLE, (version(NEW, 1),)))


def test_a_restarted_worker_is_loaded_again_and_loses_what_nobody_needs() -> None:
    again, other = worker("w0", BOTH), worker("w1", SWAP.expert_versions)
    assert plan(desired(SWAP), Observed((again, other))) == (Unload("w0", (version(A),)),)
    emptied = worker("w0", [version(B)])
    assert plan(desired(SWAP), Observed((emptied, other))) == (Load("w0", BUNDLE, (version(A, 1),)),)


def test_a_version_of_the_folder_that_was_given_up_is_read_from_there_again() -> None:
    w0 = worker("w0", SWAP.expert_versions)
    assert plan(desired(OLD), Observed((w0, worker("w1", BOTH))))[0] == Unload("w0", (version(A, 1),))
    emptied = worker("w0", [version(B)])
    assert plan(desired(OLD), Observed((emptied, worker("w1", BOTH)))) == (
        Load("w0", MODEL_FOLDER, (version(A),)),
    )


def test_without_room_for_both_the_old_copy_goes_from_one_worker_at_a_time() -> None:
    wanted = desired(OLD, SWAP, candidate=SWAP)
    w0, w1 = worker("w0", BOTH, room=0), worker("w1", BOTH, room=0)
    assert plan(wanted, Observed((w0, w1))) == (Unload("w0", (version(A),)),)
    w0 = worker("w0", [version(B)], room=10)
    assert plan(wanted, Observed((w0, w1))) == (Load("w0", BUNDLE, (version(A, 1),)),)
    w0 = worker("w0", [version(B), version(A, 1)], room=0)
    assert plan(wanted, Observed((w0, w1))) == (Publish(SWAP.id),)
    assert plan(desired(SWAP, OLD), Observed((w0, w1))) == ()
    assert plan(desired(SWAP), Observed((w0, w1))) == (Unload("w1", (version(A),)),)
    w1 = worker("w1", [version(B)], room=10)
    assert plan(desired(SWAP), Observed((w0, w1))) == (Load("w1", BUNDLE, (version(A, 1),)),)


def test_without_room_and_replicas_it_is_refused_with_what_is_missing_where() -> None:
    alone = Observed((replace(worker("w0", BOTH, room=4), bytes_per_parameter=1 << 20),))
    with pytest.raises(FailedPrecondition, match=r"w0 on w0 lacks 10\.0 MiB") as refused:
        check_room(desired(OLD, SWAP, candidate=SWAP), alone)
    assert refused.value.reason == "OUT_OF_MEMORY"


def test_a_new_expert_takes_no_copy_of_another_one_away() -> None:
    w0, w1 = worker("w0", (*BOTH, version(NEW, 1)), room=0), worker("w1", (*BOTH, version(NEW, 1)), room=0)
    more = Epoch.of(
        "tiny", {**GROWN.versions, **dict([version(ExpertAddress(0, 3), 1)])}, bundles=GROWN.bundles
    )
    wanted = desired(GROWN, more, candidate=more)
    with pytest.raises(FailedPrecondition, match="lacks"):
        check_room(wanted, Observed((w0, w1)))


def test_what_is_about_to_be_given_up_makes_room_and_is_waited_for() -> None:
    wanted = desired(OLD, SWAP, candidate=SWAP, replicas=1)
    leaving = replace(worker("w0", BOTH, room=0), leaving=frozenset({version(A, 9)}))
    check_room(wanted, Observed((leaving,)))
    assert plan(wanted, Observed((leaving,))) == ()
    assert plan(wanted, Observed((worker("w0", BOTH, room=10),))) == (Load("w0", BUNDLE, (version(A, 1),)),)


def test_a_slot_that_no_worker_serves_now_refuses_the_change() -> None:
    only_b = Observed((worker("w1", [version(B)], home=frozenset({B})),))
    with pytest.raises(Unavailable, match="no worker runs that serves layer 0 slot 0"):
        check_room(desired(OLD, SWAP, candidate=SWAP), only_b)


def test_a_worker_at_which_something_failed_is_left_alone() -> None:
    resting = replace(worker("w0", BOTH), resting=True)
    assert plan(desired(OLD, SWAP, candidate=SWAP), Observed((resting,))) == ()
