"""Slots of recurrent states: counted, copied in order, found again by the prefix that they come after."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moesaic.families.model import Attention, Hyena
from router.cache.state_cache import StateCache, StateRows
from router.scheduling.block_pool import BlockPool
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.sequence import Chunk, Sequence
from router.scheduling.state_pool import StateCopy, StatePool

BLOCK = 4
CPU = torch.device("cpu")


def test_a_sequence_begins_with_nothing_or_with_a_kept_state() -> None:
    pool = StatePool(2, 1)
    first = pool.begin(None)
    pool.keep(first, b"a")
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
        pool.keep(own, name)
    assert [pool.has(name) for name in (b"a", b"b", b"c")] == [True, False, True]
    assert len(pool.take_copies()) == 1 + 3
    pool.forget([b"a", b"unknown"])
    assert not pool.has(b"a")
    pool.check_integrity([own])


def test_the_state_that_a_sequence_goes_on_from_does_not_make_room_for_it() -> None:
    pool = StatePool(2, 1)
    first = pool.begin(None)
    pool.keep(first, b"older")
    pool.keep(first, b"newer")
    pool.take_copies()
    second = pool.begin(b"older")
    (fork,) = pool.take_copies()
    assert fork.target == second != fork.source
    assert pool.has(b"older") and not pool.has(b"newer")
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


def test_copies_are_made_in_order_and_of_all_layers() -> None:
    mixers = (Hyena(2, 3, 1), Attention(1, 1, 4), Hyena(2, 3, 1))
    cache = StateCache(mixers, 4, num_slots=3, dtype=torch.bfloat16, device=CPU)
    for layer in (0, 2):
        inputs, modes = cache.of(layer)
        assert inputs.shape == (3, 2, 12) and inputs.dtype == torch.bfloat16
        assert modes.shape == (3, 2, 4) and modes.dtype == torch.complex64
        inputs[:] = torch.tensor([1.0, 2.0, 3.0])[:, None, None] + layer
        modes[:] = torch.tensor([1.0, 2.0, 3.0])[:, None, None] * 1j
    cache.apply([StateCopy(0, 2), StateCopy(1, 0), StateCopy(None, 1)])
    for layer in (0, 2):
        inputs, modes = cache.of(layer)
        assert inputs[:, 0, 0].tolist() == [2 + layer, 0, 1 + layer]
        assert modes[:, 1, 3].imag.tolist() == [2, 0, 1]


def test_rows_of_a_batch_know_their_slots() -> None:
    sequences = [Sequence(str(index), [0] * 9, 9, state=10 + index) for index in range(3)]
    chunks = (Chunk(sequences[0], 4, 1), Chunk(sequences[1], 0, 5), Chunk(sequences[2], 8, 1))
    found = StateRows.of(chunks, (0, 1, 6), CPU)
    assert found.rows.tolist() == [0, 6] and found.slots.tolist() == [10, 12]
    assert found.runs == ((slice(1, 6), 11),)


# What the scheduler makes of it.


class Site:
    """A scheduler over states that are numbers: the sum of a sequence's tokens so far, in the slot of the sequence."""

    def __init__(
        self, *, num_blocks: int = 64, budget: int = 100, max_running: int = 4, kept: int = 4
    ) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.states = StatePool(max_running, kept)
        self.prefixes = PrefixCache(self.pool, "epoch", self.states)
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
    site.scheduler.distrust(sequence)
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
                site.scheduler.distrust(sequence)
            site.scheduler.remove(sequence)
            waiting.remove(sequence)
        if not waiting:
            break
    assert not waiting
    site.scheduler.check_integrity()
    assert site.pool.num_used == 0
