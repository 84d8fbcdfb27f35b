"""Who is admitted next."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from router.scheduling.fair_queue import MAX_TENANTS, FairQueue
from router.scheduling.sequence import Sequence


def make_sequence(name: str, tenant: str = "", num_tokens: int = 10) -> Sequence:
    return Sequence(name, [0] * num_tokens, num_tokens, tenant=tenant)


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
