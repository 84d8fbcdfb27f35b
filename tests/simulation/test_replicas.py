"""Thousands of misfortunes in virtual time: whatever happens to workers, no row is lost, wrong, or used twice."""

from __future__ import annotations

import pytest
from simulation.world import World, check

STEPS = 25


def test_whatever_happens_to_workers_every_row_is_right_or_told_to_be_missing(seeds: range) -> None:
    for seed in seeds:
        world = World(seed)
        try:
            world.run(STEPS)
            check(world)
        except Exception as error:
            pytest.fail(f"replay with: pytest tests/simulation --seed {seed}\n{type(error).__name__}: {error}")
