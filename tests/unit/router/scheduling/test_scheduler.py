"""What a step runs: pure decisions over token counts and blocks."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from router.scheduling.block_pool import BlockPool
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.sequence import Chunk, Sequence
from router.scheduling.state_pool import StatePool


def make_sequence(name: str, num_tokens: int, call: str = "") -> Sequence:
    return Sequence(name, list(range(num_tokens)), num_tokens, call=call)


def run(chunks: tuple[Chunk, ...]) -> None:
    """What the engine does with a batch: computes it, and appends a token where the end was reached."""
    for chunk in chunks:
        ends = chunk.reaches_end
        chunk.sequence.num_computed = chunk.end
        if ends:
            chunk.sequence.append(0)


def test_prompts_are_admitted_in_order_of_arrival_within_the_token_budget() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=10, max_running=8), BlockPool(16, 4))
    first, second = make_sequence("first", 6), make_sequence("second", 6)
    scheduler.add(first)
    scheduler.add(second)

    chunks = scheduler.schedule()

    assert [(chunk.sequence, chunk.start, chunk.num_tokens) for chunk in chunks] == [
        (first, 0, 6),
        (second, 0, 4),
    ]
    assert chunks[0].reaches_end and not chunks[1].reaches_end


def test_sequences_that_decode_come_before_the_rest_of_a_prompt() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=4, max_running=8), BlockPool(16, 4))
    long, short = make_sequence("long", 9), make_sequence("short", 1)
    scheduler.add(long)
    run(scheduler.schedule())
    scheduler.add(short)
    run(scheduler.schedule())  # the long prompt still takes the whole budget
    run(scheduler.schedule())  # its last token, and the short one

    chunks = scheduler.schedule()

    assert {chunk.sequence.sequence_id: chunk.num_tokens for chunk in chunks} == {"long": 1, "short": 1}


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=100, max_running=2), BlockPool(16, 4))
    for name in "abc":
        scheduler.add(make_sequence(name, 3))

    assert len(scheduler.schedule()) == 2
    assert len(scheduler.waiting) == 1


def test_when_blocks_run_out_the_newest_sequence_starts_over_and_loses_no_token() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=100, max_running=8), BlockPool(4, 4))
    old, new = make_sequence("old", 8), make_sequence("new", 8)
    scheduler.add(old)
    scheduler.add(new)
    run(scheduler.schedule())  # both prompts fill the pool; each has one token more now

    chunks = scheduler.schedule()

    assert [chunk.sequence for chunk in chunks] == [old]
    assert scheduler.num_preemptions == 1
    assert list(scheduler.waiting) == [new] and new.num_computed == 0 and len(new.tokens) == 9
    scheduler.check_integrity()


def test_a_call_of_many_sequences_gives_a_place_to_one_that_has_none() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=100, max_running=4), BlockPool(64, 4))
    for index in range(6):
        scheduler.add(make_sequence(f"many{index}", 3, call="many"))
    run(scheduler.schedule())
    single = make_sequence("single", 3)
    scheduler.add(single)

    chunks = scheduler.schedule()

    assert [chunk.sequence.sequence_id for chunk in chunks] == ["many0", "many1", "many2", "single"]
    assert [sequence.sequence_id for sequence in scheduler.waiting] == ["many4", "many5", "many3"]
    run(chunks)
    assert scheduler.schedule() and scheduler.num_preemptions == 1, "the place does not go back"
    scheduler.check_integrity()


def test_a_call_of_many_sequences_gives_its_blocks_to_one_that_has_none() -> None:
    pool = BlockPool(8, 4)
    scheduler = Scheduler(Limits(max_batch_tokens=100, max_running=64), pool)
    for index in range(4):
        scheduler.add(make_sequence(f"many{index}", 7, call="many"))
    run(scheduler.schedule())
    assert pool.num_free == 0
    single = make_sequence("single", 8)
    scheduler.add(single)

    chunks = scheduler.schedule()
    assert single in [chunk.sequence for chunk in chunks]
    for _ in range(10):  # from here on the pool runs dry, at the cost of those who hold most
        run(chunks)
        chunks = scheduler.schedule()
    assert len(single.output) >= 8
    scheduler.check_integrity()


def test_a_paused_sequence_gives_its_place_up_and_comes_back_behind_those_that_wait() -> None:
    pool = BlockPool(16, 4)
    scheduler = Scheduler(Limits(max_batch_tokens=100, max_running=1), pool)
    first, second, third = (make_sequence(name, 3) for name in "abc")
    for sequence in (first, second, third):
        scheduler.add(sequence)
    run(scheduler.schedule())
    scheduler.pause(first)
    scheduler.pause(third)
    scheduler.pause(third)

    assert [chunk.sequence for chunk in scheduler.schedule()] == [second]
    scheduler.resume(first)
    scheduler.resume(third)
    scheduler.resume(third)
    assert list(scheduler.waiting) == [first, third]
    scheduler.remove(second)
    (chunk,) = scheduler.schedule()
    assert (chunk.sequence, chunk.start, chunk.end) == (first, 0, 4), "it starts over and has lost no token"
    scheduler.pause(first)
    scheduler.remove(first)
    scheduler.remove(third)
    assert pool.num_used == 0 and not scheduler.has_work


def parked_one(scheduler: Scheduler, num_tokens: int = 6) -> Sequence:
    """A sequence that has computed its prompt and is parked."""
    sequence = make_sequence("parked", num_tokens)
    scheduler.add(sequence)
    run(scheduler.schedule())
    scheduler.park(sequence)
    return sequence


def test_a_parked_sequence_keeps_its_blocks_and_goes_on_where_it_stopped() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=10, max_running=1), BlockPool(16, 4))
    sequence = parked_one(scheduler)
    assert not scheduler.has_work and scheduler.num_parked == 1 and len(sequence.blocks) == 2
    assert scheduler.schedule() == ()
    scheduler.unpark(sequence)
    (chunk,) = scheduler.schedule()
    assert (chunk.sequence, chunk.start, chunk.num_tokens) == (sequence, 6, 1)
    assert scheduler.num_preemptions == 0


def test_a_parked_sequence_gives_its_place_up_at_once() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=10, max_running=1), BlockPool(16, 4))
    sequence, other = parked_one(scheduler), make_sequence("other", 3)
    scheduler.add(other)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [other]
    # Back before there is a place, it starts over, ahead of all that wait.
    scheduler.add(make_sequence("third", 3))
    scheduler.unpark(sequence)
    assert sequence.num_computed == 0 and not sequence.blocks
    scheduler.remove(other)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [sequence]


def test_the_blocks_of_a_parked_sequence_go_to_who_needs_them() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=20, max_running=4), BlockPool(4, 4))
    sequence, other = parked_one(scheduler), make_sequence("other", 12)
    scheduler.add(other)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [other]
    assert not sequence.blocks and scheduler.is_parked(sequence)
    scheduler.check_integrity()
    scheduler.remove(other)
    scheduler.unpark(sequence)
    (chunk,) = scheduler.schedule()
    assert (chunk.start, chunk.num_tokens) == (0, 7)


def test_a_running_sequence_that_grows_takes_the_blocks_of_a_parked_one_first() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=20, max_running=4), BlockPool(4, 4))
    sequence, other = parked_one(scheduler), make_sequence("other", 8)
    scheduler.add(other)
    run(scheduler.schedule())
    (chunk,) = scheduler.schedule()
    assert chunk.sequence is other and not sequence.blocks


def test_a_parked_sequence_can_be_removed_and_paused() -> None:
    scheduler = Scheduler(Limits(max_batch_tokens=20, max_running=4), BlockPool(4, 4))
    sequence = parked_one(scheduler)
    scheduler.pause(sequence)
    assert scheduler.num_parked == 0 and scheduler.pool.num_used == 0
    scheduler.unpark(sequence)
    assert not scheduler.has_work
    scheduler.resume(sequence)
    run(scheduler.schedule())
    scheduler.park(sequence)
    scheduler.remove(sequence)
    assert scheduler.num_parked == 0 and scheduler.pool.num_used == 0


def test_a_recurrent_sequence_starts_over_when_it_is_parked() -> None:
    states = StatePool(1, 1)
    scheduler = Scheduler(Limits(max_batch_tokens=20, max_running=1), BlockPool(8, 4), states=states)
    sequence = parked_one(scheduler)
    assert sequence.state is None and sequence.num_computed == 0
    other = make_sequence("other", 3)
    scheduler.add(other)
    scheduler.schedule()
    scheduler.check_integrity()


def test_a_removed_sequence_gives_all_its_blocks_back() -> None:
    pool = BlockPool(8, 4)
    scheduler = Scheduler(Limits(max_batch_tokens=100, max_running=8), pool)
    sequence = make_sequence("a", 9)
    scheduler.add(sequence)
    scheduler.schedule()
    assert pool.num_used == 3

    scheduler.remove(sequence)

    assert pool.num_used == 0
    assert scheduler.schedule() == ()


def test_a_prompt_that_is_read_as_a_whole_may_be_the_last_of_a_longer_batch() -> None:
    limits = Limits(max_batch_tokens=10, max_running=8, whole_prompts=True)
    scheduler = Scheduler(limits, BlockPool(16, 4))
    first, second, third = (make_sequence(name, length) for name, length in (("a", 6), ("b", 20), ("c", 3)))
    for sequence in (first, second, third):
        scheduler.add(sequence)

    chunks = scheduler.schedule()
    run(chunks)

    assert [(chunk.sequence, chunk.start, chunk.num_tokens) for chunk in chunks] == [
        (first, 0, 6),
        (second, 0, 20),
    ]
    assert [(chunk.sequence, chunk.num_tokens) for chunk in scheduler.schedule()] == [
        (first, 1),
        (second, 1),
        (third, 3),
    ]


def test_what_was_generated_behind_a_whole_prompt_is_cut_where_the_budget_ends() -> None:
    limits = Limits(max_batch_tokens=4, max_running=8, whole_prompts=True)
    scheduler = Scheduler(limits, BlockPool(16, 4))
    sequence = make_sequence("started over", 6)
    for _ in range(7):
        sequence.append(0)
    scheduler.add(sequence)
    cuts = []
    for _ in range(3):
        chunks = scheduler.schedule()
        cuts += [(chunk.start, chunk.end) for chunk in chunks]
        run(chunks)
    assert cuts == [(0, 6), (6, 10), (10, 13)]


@given(
    prompts=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    budget=st.integers(1, 16),
    max_running=st.integers(1, 6),
    num_blocks=st.integers(10, 20),
    whole_prompts=st.booleans(),
    num_calls=st.integers(1, 8),
)
def test_every_sequence_finishes_and_no_block_is_lost_whatever_the_bounds(
    prompts: list[int], budget: int, max_running: int, num_blocks: int, whole_prompts: bool, num_calls: int
) -> None:
    pool = BlockPool(num_blocks, 4)  # the longest sequence has 24 + 8 tokens: it fits alone
    scheduler = Scheduler(Limits(budget, max_running, whole_prompts), pool)
    open_sequences = [
        make_sequence(str(index), length, call=str(index % num_calls)) for index, length in enumerate(prompts)
    ]
    for sequence in open_sequences:
        scheduler.add(sequence)

    for _ in range(2000):
        chunks = scheduler.schedule()
        in_bounds = chunks[:-1] if whole_prompts and chunks and chunks[-1].start == 0 else chunks
        assert sum(chunk.num_tokens for chunk in in_bounds) <= budget
        assert not whole_prompts or all(
            chunk.start >= chunk.sequence.num_prompt_tokens or chunk.end >= chunk.sequence.num_prompt_tokens
            for chunk in chunks
        )
        assert len(scheduler.running) <= max_running
        scheduler.check_integrity()
        run(chunks)
        for sequence in [s for s in open_sequences if len(s.output) >= 8]:
            open_sequences.remove(sequence)
            scheduler.remove(sequence)
        if not open_sequences:
            break

    assert not open_sequences
    assert pool.num_used == 0
