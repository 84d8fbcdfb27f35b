"""Who is admitted next."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from router.scheduling.fair_queue import MAX_TENANTS, FairQueue
from router.scheduling.sequence import Sequence


def make_sequence(name: str, tenant: str = "", num_tokens: int = 10, call: str = "") -> Sequence:
    return Sequence(name, [0] * num_tokens, num_tokens, tenant=tenant, call=call)


def run_all(queue: FairQueue, *sequences: Sequence) -> list[Sequence]:
    """Admits them, and returns what runs."""
    arrive(queue, *sequences)
    for sequence in sequences:
        queue.admit(sequence)
    return list(sequences)


def claimed(queue: FairQueue, running: list[Sequence]) -> tuple[str, str] | None:
    claim = queue.claim(running)
    return None if claim is None else (claim[0].sequence_id, claim[1].sequence_id)


def arrive(queue: FairQueue, *sequences: Sequence) -> None:
    for sequence in sequences:
        queue.add(sequence)


def admit_all(queue: FairQueue) -> list[str]:
    admitted = []
    for sequence in queue:
        queue.admit(sequence)
        admitted.append(sequence.sequence_id)
    return admitted


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue = FairQueue()
    arrive(queue, *(make_sequence(name) for name in "abc"))
    assert admit_all(queue) == ["a", "b", "c"]
    assert len(queue) == 0


def test_tenants_take_turns_by_the_tokens_they_were_given() -> None:
    queue = FairQueue()
    arrive(queue, *(make_sequence(f"long{index}", "long", 30) for index in range(3)))
    arrive(queue, *(make_sequence(f"short{index}", "short", 10) for index in range(5)))
    assert admit_all(queue) == [
        "long0",
        "short0",
        "short1",
        "short2",
        "long1",
        "short3",
        "short4",
        "long2",
    ]


def test_generated_tokens_count_as_well() -> None:
    queue = FairQueue()
    arrive(queue, make_sequence("a0", "a"), make_sequence("a1", "a"), make_sequence("b0", "b", 100))
    for sequence in queue:
        queue.admit(sequence)
        break
    queue.charge("a", 1000)
    assert admit_all(queue) == ["b0", "a1"]


def test_what_is_cached_is_not_charged() -> None:
    queue = FairQueue()
    cached = make_sequence("a0", "a", 100)
    cached.num_computed = 96
    arrive(queue, cached, make_sequence("a1", "a"), make_sequence("b0", "b"), make_sequence("b1", "b"))
    assert admit_all(queue) == ["a0", "b0", "a1", "b1"]


def test_a_tenant_that_was_idle_brings_no_credit() -> None:
    queue = FairQueue()
    arrive(queue, *(make_sequence(f"busy{index}", "busy", 100) for index in range(3)))
    first = next(iter(queue))
    queue.admit(first)
    queue.charge("busy", 10_000)
    arrive(queue, *(make_sequence(f"new{index}", "new", 100) for index in range(3)))
    assert admit_all(queue) == ["busy1", "new0", "busy2", "new1", "new2"]


def test_a_tenant_alone_does_not_pay_for_it_when_others_come() -> None:
    queue = FairQueue()
    arrive(queue, make_sequence("busy0", "busy", 100))
    admit_all(queue)
    queue.charge("busy", 10_000)  # nobody waits
    arrive(queue, make_sequence("new0", "new", 50), make_sequence("new1", "new", 50))
    arrive(queue, make_sequence("busy1", "busy", 50), make_sequence("busy2", "busy", 50))
    assert admit_all(queue) == ["new0", "busy1", "new1", "busy2"]


def test_who_lost_a_place_comes_first_the_oldest_of_them_before_the_others() -> None:
    queue = FairQueue()
    older, newer, waiting = make_sequence("older", "z"), make_sequence("newer", "z"), make_sequence("w", "a")
    arrive(queue, waiting)
    queue.put_back(newer)  # the newest is preempted first
    queue.put_back(older)
    assert [sequence.sequence_id for sequence in queue] == ["older", "newer", "w"]
    queue.remove(newer)
    assert admit_all(queue) == ["older", "w"]


def test_the_call_that_holds_the_fewest_places_comes_first() -> None:
    queue = FairQueue()
    run_all(queue, make_sequence("a0", call="a"))
    arrive(queue, *(make_sequence(name, call=name[0]) for name in ("a1", "a2", "b0", "b1", "b2", "c0")))
    assert admit_all(queue) == ["b0", "c0", "a1", "b1", "a2", "b2"]


def test_a_place_goes_from_the_call_that_holds_most_to_one_that_holds_at_least_two_fewer() -> None:
    queue = FairQueue()
    running = run_all(queue, *(make_sequence(name, call=name[0]) for name in ("a0", "b0", "a1", "b1", "a2")))
    arrive(queue, make_sequence("b2", call="b"))
    assert claimed(queue, running) is None, "it would only change places"
    arrive(queue, make_sequence("c0", call="c"))
    assert claimed(queue, running) == ("c0", "a2")
    queue.leave(running.pop())
    assert claimed(queue, running) == ("c0", "b1"), "the newest of those that hold most"
    queue.leave(running.pop(3))
    queue.leave(running.pop(2))
    assert claimed(queue, running) is None


def test_calls_of_one_sequence_wait_for_each_other() -> None:
    queue = FairQueue()
    running = run_all(queue, make_sequence("a"), make_sequence("b"))
    arrive(queue, make_sequence("c"))
    assert claimed(queue, running) is None


def test_a_tenant_with_many_calls_gives_places_to_one_with_few() -> None:
    queue = FairQueue()
    running = run_all(queue, *(make_sequence(f"a{index}", "a") for index in range(4)))
    arrive(queue, make_sequence("a4", "a"), *(make_sequence(f"b{index}", "b") for index in range(4)))
    moved = []
    while (claim := queue.claim(running)) is not None:
        claimant, holder = claim
        queue.leave(holder)
        running.remove(holder)
        queue.admit(claimant)
        running.append(claimant)
        moved.append((claimant.sequence_id, holder.sequence_id))
    assert moved == [("b0", "a3"), ("b1", "a2")]


def test_nothing_is_kept_about_who_holds_no_place_any_more() -> None:
    queue = FairQueue()
    for sequence in run_all(queue, *(make_sequence(name, name, call=name) for name in "abc")):
        queue.leave(sequence)
    assert not queue._tenant_places and not queue._call_places


def test_counters_are_kept_for_so_many_tenants_and_no_more() -> None:
    queue = FairQueue()
    for index in range(2 * MAX_TENANTS):
        arrive(queue, make_sequence(str(index), f"tenant {index}"))
        admit_all(queue)
    assert len(queue._served) == MAX_TENANTS


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=40))
def test_nobody_who_waits_falls_behind_by_more_than_one_prompt(arrivals: list[tuple[str, int]]) -> None:
    queue = FairQueue()
    for index, (tenant, num_tokens) in enumerate(arrivals):
        arrive(queue, make_sequence(str(index), tenant, num_tokens))
    waiting = {tenant: sum(1 for name, _ in arrivals if name == tenant) for tenant in "abc"}
    given_tokens = dict.fromkeys("abc", 0)
    for sequence in queue:
        queue.admit(sequence)
        waiting[sequence.tenant] -= 1
        given_tokens[sequence.tenant] += len(sequence.tokens)
        for tenant, left in waiting.items():
            assert not left or given_tokens[tenant] >= given_tokens[sequence.tenant] - len(sequence.tokens)
    assert not any(waiting.values())
