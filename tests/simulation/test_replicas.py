"""Thousands of misfortunes in virtual time: whatever happens to workers, no row is lost, wrong, or used twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from simulation.world import World, check

STEPS = 12


# What may go by until a call is late although nothing is known of its kind, and until its hedge is answered.
LONGEST_LAYER_S = 0.6


def test_whatever_happens_to_workers_every_row_is_right_or_told_to_be_missing(seeds: range) -> None:
    for seed in seeds:
        with replayable(seed):
            world = World(seed)
            world.run(STEPS)
            check(world)


def test_what_happens_to_one_replica_fails_no_token_and_holds_up_none_for_long(seeds: range) -> None:
    for seed in seeds:
        with replayable(seed):
            world = World(seed, only="w0")
            tally = world.run(STEPS)
            check(world)
            assert not tally.failed, f"tokens failed: {dict(tally.failed)}"
            assert tally.longest_layer_s <= LONGEST_LAYER_S, f"a layer took {tally.longest_layer_s} s"


def test_a_seed_tells_the_whole_story() -> None:
    assert World(7).run(STEPS) == World(7).run(STEPS)


@contextmanager
def replayable(seed: int) -> Iterator[None]:
    """Names the seed of a schedule that fails."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"replay with: pytest tests/simulation --seed {seed}\n{type(error).__name__}: {error}")
