"""Cached prefixes: found by name, shared without a copy, given up when the room is needed, never wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given

from router.scheduling.block_pool import BlockPool
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.sequence import Chunk, Sequence
from router.scheduling.state_pool import StatePool

BLOCK = 4


def make_scheduler(pool: BlockPool, *, budget: int = 100, max_running: int = 8) -> Scheduler:
    return Scheduler(Limits(budget, max_running), pool, prefixes=PrefixCache(pool))


def make_sequence(
    name: str, tokens: list[int], *, view: str = "e", tenant: str = "", reads_all: bool = False
) -> Sequence:
    return Sequence(name, list(tokens), len(tokens), view, tenant, reads_all=reads_all)


def compute(scheduler: Scheduler, chunks: tuple[Chunk, ...], token: int = 0) -> None:
    """What the engine does with a batch; each sequence that reached its end gets `token`."""
    for chunk in chunks:
        ends = chunk.reaches_end
        scheduler.advance(chunk)
        if ends:
            chunk.sequence.append(token)


def starts(chunks: tuple[Chunk, ...]) -> dict[str, int]:
    return {chunk.sequence.sequence_id: chunk.start for chunk in chunks}


def run_alone(scheduler: Scheduler, sequence: Sequence) -> int:
    """Reads a sequence's prompt and lets it go; how many of its tokens it found."""
    scheduler.add(sequence)
    first = scheduler.schedule()
    chunks = first
    while not sequence.output:
        compute(scheduler, chunks)
        chunks = () if sequence.output else scheduler.schedule()
    scheduler.remove(sequence)
    return first[0].start


def test_a_prompt_that_was_read_before_is_read_from_its_last_full_block_on() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler = make_scheduler(pool)
    prompt = list(range(11))
    assert run_alone(scheduler, make_sequence("first", prompt)) == 0
    assert run_alone(scheduler, make_sequence("second", prompt)) == 8
    assert scheduler.prefixes is not None
    assert (scheduler.prefixes.num_looked_up, scheduler.prefixes.num_hit) == (22, 8)
    assert pool.num_used == 0


def test_the_last_token_is_computed_even_if_every_block_is_there() -> None:
    scheduler = make_scheduler(BlockPool(16, BLOCK))
    prompt = list(range(8))
    run_alone(scheduler, make_sequence("first", prompt))
    assert run_alone(scheduler, make_sequence("second", prompt)) == 4


def test_another_beginning_makes_another_block_of_the_same_tokens() -> None:
    scheduler = make_scheduler(BlockPool(16, BLOCK))
    run_alone(scheduler, make_sequence("first", [1, 1, 1, 1, 7, 7, 7, 7, 0]))
    assert run_alone(scheduler, make_sequence("second", [2, 2, 2, 2, 7, 7, 7, 7, 0])) == 0
    assert run_alone(scheduler, make_sequence("third", [1, 1, 1, 1, 8, 8, 8, 8, 0])) == 4


def test_neither_another_tenant_nor_another_epoch_nor_another_policy_finds_a_prefix() -> None:
    pool = BlockPool(32, BLOCK)
    scheduler, prompt = make_scheduler(pool), list(range(11))
    run_alone(scheduler, make_sequence("first", prompt, tenant="a"))
    assert run_alone(scheduler, make_sequence("second", prompt, tenant="b")) == 0
    assert run_alone(scheduler, make_sequence("third", prompt, view="f", tenant="a")) == 0
    assert run_alone(scheduler, make_sequence("denying", prompt, view="e/0123", tenant="a")) == 0
    assert run_alone(scheduler, make_sequence("fourth", prompt, tenant="a")) == 8


def test_a_tenant_cannot_spell_another_epoch() -> None:
    pool = BlockPool(32, BLOCK)
    scheduler, prompt = make_scheduler(pool), list(range(11))
    run_alone(scheduler, make_sequence("first", prompt, view="e", tenant="x\0y"))
    assert run_alone(scheduler, make_sequence("b", prompt, view="ex", tenant="y")) == 0


def test_who_wants_the_whole_prompt_scored_takes_nothing_but_leaves_it_to_others() -> None:
    scheduler, prompt = make_scheduler(BlockPool(16, BLOCK)), list(range(11))
    assert run_alone(scheduler, make_sequence("first", prompt, reads_all=True)) == 0
    assert run_alone(scheduler, make_sequence("second", prompt, reads_all=True)) == 0
    assert run_alone(scheduler, make_sequence("third", prompt)) == 8
    assert scheduler.prefixes is not None and scheduler.prefixes.num_looked_up == len(prompt)


def test_a_conversation_goes_on_behind_its_own_answer() -> None:
    scheduler = make_scheduler(BlockPool(16, BLOCK))
    sequence = make_sequence("first", [1, 2, 3, 4, 5, 6])
    scheduler.add(sequence)
    for _ in range(4):
        compute(scheduler, scheduler.schedule(), token=9)
    scheduler.remove(sequence)
    assert run_alone(scheduler, make_sequence("second", [1, 2, 3, 4, 5, 6, 9, 9, 9, 3])) == 8


def test_what_was_never_advanced_is_never_found() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler, prompt = make_scheduler(pool), list(range(11))
    failed = make_sequence("failed", prompt)
    scheduler.add(failed)
    scheduler.schedule()  # an expert was missing: the engine removes it without advancing
    scheduler.remove(failed)
    scheduler.check_integrity()
    assert run_alone(scheduler, make_sequence("second", prompt)) == 0


def test_blocks_whose_values_were_wrong_are_forgotten() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler, prompt = make_scheduler(pool), list(range(11))
    wrong = make_sequence("wrong", prompt)
    scheduler.add(wrong)
    compute(scheduler, scheduler.schedule())
    scheduler.discard_cached(wrong)
    scheduler.remove(wrong)
    scheduler.check_integrity()
    assert run_alone(scheduler, make_sequence("second", prompt)) == 0


def test_continuations_of_one_prompt_wait_for_the_first_and_share_it() -> None:
    pool = BlockPool(32, BLOCK)
    scheduler, prompt = make_scheduler(pool, budget=8), list(range(18))
    continuations = [make_sequence(str(index), prompt) for index in range(4)]
    for sequence in continuations:
        scheduler.add(sequence)
    assert starts(scheduler.schedule()) == {"0": 0}
    compute(scheduler, (Chunk(continuations[0], 0, 8),))
    assert starts(scheduler.schedule()) == {"0": 8}
    compute(scheduler, (Chunk(continuations[0], 8, 8),))
    assert starts(scheduler.schedule()) == {"0": 16, "1": 16, "2": 16, "3": 16}
    assert pool.num_used == 4 + 4  # four shared, and one of each
    scheduler.check_integrity()


def test_another_prompt_does_not_wait_behind_those_who_share_one() -> None:
    scheduler = make_scheduler(BlockPool(32, BLOCK), budget=24)
    for name in "ab":
        scheduler.add(make_sequence(name, list(range(18))))
    scheduler.add(make_sequence("c", [7] * 6))
    assert starts(scheduler.schedule()) == {"a": 0, "c": 0}


def test_who_waited_for_a_prompt_reads_it_when_its_reader_is_gone() -> None:
    scheduler = make_scheduler(BlockPool(32, BLOCK), budget=8)
    first, second = make_sequence("a", list(range(18))), make_sequence("b", list(range(18)))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.remove(first)
    assert starts(scheduler.schedule()) == {"b": 0}


def test_kept_blocks_make_room_the_longest_unused_first_and_a_chain_from_its_end() -> None:
    pool = BlockPool(8, BLOCK)
    scheduler = make_scheduler(pool)
    old, new = [1] * 13, [2] * 13
    run_alone(scheduler, make_sequence("old", old))
    run_alone(scheduler, make_sequence("new", new))  # three blocks of each are kept
    assert pool.num_free == 8
    run_alone(scheduler, make_sequence("third", [3] * 14))  # takes two free ones, and two of the old
    assert run_alone(scheduler, make_sequence("new again", [*new[:12], 5])) == 12
    assert run_alone(scheduler, make_sequence("old again", [*old[:12], 5])) == 4


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    pool = BlockPool(6, BLOCK)
    scheduler = make_scheduler(pool)
    old, new = make_sequence("old", [1] * 11), make_sequence("new", [2] * 11)
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(2):
        compute(scheduler, scheduler.schedule(), token=5)
    compute(scheduler, scheduler.schedule(), token=5)  # the old one needs a fourth block, and takes it
    assert scheduler.num_preemptions == 1 and new.blocks == []
    scheduler.remove(old)
    assert starts(scheduler.schedule()) == {"new": 8}
    scheduler.check_integrity()


def test_sharing_needs_no_room_for_what_is_shared() -> None:
    pool = BlockPool(7, BLOCK)
    scheduler, prompt = make_scheduler(pool), list(range(18))
    first = make_sequence("first", prompt)
    scheduler.add(first)
    compute(scheduler, scheduler.schedule())  # five blocks, four of them full
    second = make_sequence("second", prompt)
    scheduler.add(second)
    assert starts(scheduler.schedule()) == {"first": 18, "second": 16}
    assert pool.num_used == 6


@dataclass
class World:
    """An engine that keeps in every cache position the whole prefix that its keys and values were computed from."""

    scheduler: Scheduler
    cache: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        for chunk in chunks:
            self._compute(chunk)
        for chunk in chunks:
            ends = chunk.reaches_end
            self.scheduler.advance(chunk)
            if ends:
                chunk.sequence.append(next_token(chunk.sequence.tokens))
        self.scheduler.check_integrity()

    def _compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        for position in range(chunk.start, chunk.end):
            place = (sequence.blocks[position // BLOCK], position % BLOCK)
            self.cache[place] = tuple(sequence.tokens[: position + 1])
        for position in range(chunk.end):
            place = (sequence.blocks[position // BLOCK], position % BLOCK)
            assert self.cache[place] == tuple(sequence.tokens[: position + 1]), "read what it did not mean"


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % 3


# Few tokens and few tenants, so that prefixes meet.
Prompts = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=20), st.sampled_from(["", "a"]), st.booleans()
    ),
    min_size=1,
    max_size=10,
)


@given(
    prompts=Prompts,
    budget=st.integers(1, 24),
    max_running=st.integers(1, 5),
    num_blocks=st.integers(7, 24),
    cancelled=st.sets(st.integers(0, 9), max_size=3),
    data=st.data(),
)
def test_whatever_the_schedule_every_sequence_reads_its_own_tokens_and_nothing_leaks(
    prompts: list[tuple[list[int], str, bool]],
    budget: int,
    max_running: int,
    num_blocks: int,
    cancelled: set[int],
    data: st.DataObject,
) -> None:
    pool = BlockPool(num_blocks, BLOCK)  # the longest sequence has 20 + 6 tokens: it fits alone
    scheduler = make_scheduler(pool, budget=budget, max_running=max_running)
    world = World(scheduler)
    coming = [
        make_sequence(str(index), tokens, tenant=tenant, reads_all=reads_all)
        for index, (tokens, tenant, reads_all) in enumerate(prompts)
    ]
    open_sequences: list[Sequence] = []
    for _ in range(3000):
        if coming and (not open_sequences or data.draw(st.booleans())):
            open_sequences.append(coming.pop(0))
            scheduler.add(open_sequences[-1])
        world.step()
        for sequence in list(open_sequences):
            gives_up = int(sequence.sequence_id) in cancelled and len(sequence.output) == 2
            if len(sequence.output) >= 6 or gives_up:
                open_sequences.remove(sequence)
                scheduler.remove(sequence)
                expected = sequence.tokens[: sequence.num_prompt_tokens]
                for _ in sequence.output:
                    expected.append(next_token(expected))
                assert sequence.tokens == expected
        if not coming and not open_sequences:
            break
    assert not coming and not open_sequences
    assert pool.num_used == 0
    scheduler.check_integrity()


# With recurrent states.


class Site:
    """A scheduler over states that are numbers: the sum of a sequence's tokens so far, in the slot of the sequence."""

    def __init__(
        self, *, num_blocks: int = 64, budget: int = 100, max_running: int = 4, kept: int = 4
    ) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.states = StatePool(max_running, kept)
        self.prefixes = PrefixCache(self.pool, self.states)
        self.scheduler = Scheduler(
            Limits(budget, max_running), self.pool, prefixes=self.prefixes, states=self.states
        )
        self.sums = [-1] * self.states.num_slots

    def step(self) -> list[tuple[str, int, int]]:
        """Runs a step and checks every state that comes out of it: (name, start, end) of each chunk."""
        chunks = self.scheduler.schedule()
        for copy in self.states.take_copies():
            self.sums[copy.target] = 0 if copy.source is None else self.sums[copy.source]
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.state is not None
            self.sums[sequence.state] += sum(sequence.tokens[chunk.start : chunk.end])
            assert self.sums[sequence.state] == sum(sequence.tokens[: chunk.end])
            ends = chunk.reaches_end
            self.scheduler.advance(chunk)
            if ends:
                sequence.append(self.sums[sequence.state] % 7)
        self.scheduler.check_integrity()
        return [(chunk.sequence.sequence_id, chunk.start, chunk.end) for chunk in chunks]

    def add(self, name: str, tokens: list[int], **options: bool) -> Sequence:
        sequence = Sequence(name, list(tokens), len(tokens), **options)
        self.scheduler.add(sequence)
        return sequence

    def read(self, name: str, tokens: list[int]) -> list[tuple[int, int]]:
        """Reads a prompt alone and lets go of it: its chunks."""
        sequence = self.add(name, tokens)
        chunks = []
        while not sequence.output:
            chunks += [(start, end) for _, start, end in self.step()]
        self.scheduler.remove(sequence)
        self.scheduler.check_integrity()
        return chunks


def test_a_prompt_is_cut_at_its_last_full_block_and_read_from_there_when_it_comes_again() -> None:
    site, prompt = Site(), list(range(11))
    assert site.read("first", prompt) == [(0, 8), (8, 11)]
    assert site.read("second", prompt) == [(8, 11)]
    assert (site.prefixes.num_looked_up, site.prefixes.num_hit) == (22, 8)
    assert site.read("of full blocks", list(range(8))) == [(0, 4), (4, 8)]
    assert site.read("too short", [1, 2, 3]) == [(0, 3)]


def test_what_is_asked_next_goes_on_from_what_was_asked_before() -> None:
    site = Site()
    site.read("first", list(range(11)))
    assert site.read("next", [*range(11), *range(50, 62)]) == [(8, 20), (20, 23)]


def test_a_beginning_that_two_prompts_share_is_kept_from_the_second_on() -> None:
    site, shared = Site(), list(range(12))
    assert site.read("a", [*shared, 30, 31, 32, 33, 34]) == [(0, 16), (16, 17)]
    # The blocks of the beginning are there and no state is: it is read once more, and kept.
    assert site.read("b", [*shared, 40, 41, 42, 43, 44]) == [(0, 12), (12, 16), (16, 17)]
    assert site.read("c", [*shared, 50, 51, 52, 53, 54]) == [(12, 16), (16, 17)]


def test_a_prefix_without_its_blocks_is_not_offered_whatever_states_are_kept() -> None:
    site, prompt = Site(num_blocks=4), list(range(11))
    site.read("first", prompt)
    site.read("another", list(range(100, 115)))
    assert site.read("first again", prompt)[0][0] == 0


def test_a_prefix_without_a_state_is_not_offered_whatever_blocks_are_kept() -> None:
    site, prompt = Site(max_running=1, kept=1), list(range(11))
    site.read("first", prompt)
    site.read("another", list(range(100, 115)))
    assert site.read("first again", prompt) == [(0, 8), (8, 11)]


def test_prompts_that_are_alike_wait_for_the_state_of_the_first() -> None:
    site, prompt = Site(budget=8), list(range(30))
    for name in "abc":
        site.add(name, prompt)
    steps = [site.step() for _ in range(5)]
    assert steps[:4] == [[("a", 0, 8)], [("a", 8, 16)], [("a", 16, 24)], [("a", 24, 28)]]
    assert steps[4] == [("a", 28, 30), ("b", 28, 30), ("c", 28, 30)]


def test_a_prompt_whose_every_logit_is_wanted_takes_nothing_and_is_not_cut() -> None:
    site, prompt = Site(), list(range(11))
    site.read("first", prompt)
    scored = site.add("scored", prompt, reads_all=True)
    assert site.step() == [("scored", 0, 11)]
    site.scheduler.remove(scored)


def test_what_is_distrusted_is_not_found_even_when_its_blocks_are_computed_again() -> None:
    site, prompt = Site(), list(range(11))
    sequence = site.add("bad", prompt)
    while not sequence.output:
        site.step()
    site.scheduler.discard_cached(sequence)
    site.scheduler.remove(sequence)
    assert site.read("scored", prompt)[0] == (0, 8)


def test_without_prefixes_nothing_is_kept_or_cut() -> None:
    pool, states = BlockPool(16, BLOCK), StatePool(2, 1)
    scheduler = Scheduler(Limits(100, 2), pool, states=states)
    scheduler.add(Sequence("a", list(range(11)), 11))
    (chunk,) = scheduler.schedule()
    assert chunk.num_tokens == 11
    assert len(states.take_copies()) == 1


@given(st.data())
def test_any_run_gives_every_sequence_its_own_state_and_loses_no_slot(data: st.DataObject) -> None:
    site = Site(
        num_blocks=data.draw(st.integers(6, 16)),
        budget=data.draw(st.integers(1, 20)),
        max_running=data.draw(st.integers(1, 3)),
        kept=data.draw(st.integers(1, 3)),
    )
    numbers = st.lists(st.integers(0, 1), min_size=1, max_size=14)
    waiting = [
        site.add(str(index), data.draw(numbers), reads_all=data.draw(st.booleans()))
        for index in range(data.draw(st.integers(1, 6)))
    ]
    for _ in range(200):
        site.step()
        for sequence in [s for s in waiting if len(s.output) >= 3]:
            if data.draw(st.booleans()):
                site.scheduler.discard_cached(sequence)
            site.scheduler.remove(sequence)
            waiting.remove(sequence)
        if not waiting:
            break
    assert not waiting
    site.scheduler.check_integrity()
    assert site.pool.num_used == 0
